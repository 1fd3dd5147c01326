"""A decode step of FlashInfer's MLA: which requests and pages each streaming multiprocessor reads, planned outside of
CUDA graphs."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longcat_vllm import requested

WORKSPACE_BYTES = 32 << 20
"""For partial results: 2 x 132 multiprocessors x 64 rows x (512 x 2 + 4) bytes are 17.4 MB (`MLAPlan`)."""
STEPS_IN_FLIGHT = 2
"""With asynchronous scheduling a step is planned while the one before it still runs."""


@dataclass(frozen=True)
class DecodeSizes:
    """What does not change from step to step."""

    num_heads: int
    """Query heads of this rank."""
    kv_lora_rank: int
    rope_dim: int
    page_size: int
    max_requests: int
    max_pages: int
    """Of one request."""
    softmax_scale: float
    query_dtype: torch.dtype
    cache_dtype: torch.dtype
    num_drafts: int


@dataclass(frozen=True)
class DecodeStep:
    """The requests of one step, n of them, each with its last tokens as queries."""

    query_starts: Tensor
    """int32 [n + 1], on the CPU. Requests that pad a CUDA graph have no queries, and are the last ones."""
    num_queries: int
    """Of all requests, with those of padding."""
    length_bounds: Tensor
    """int32 [n], on the CPU: tokens of a request in the cache, at most."""
    lengths: Tensor
    """int32 [n], on the device: how many there are. Shorter than the bound where drafts were rejected."""
    block_table: Tensor
    """int32 [n, pages], on the device."""


class DecodePlans:
    """The plans of one attention group. Its layers share them, as a plan depends on the requests alone.

    FlashInfer gives a request two blocks that share what they read, a tile of 128 rows, if a request has more than 64
    rows (tokens x heads) on average, and a CUDA graph keeps that choice. So a plan has room for the next power of two
    of requests, and for padding as many queries as for others: then all steps that replay a graph choose the same.
    """

    def __init__(self, sizes: DecodeSizes, device: torch.device) -> None:
        """
        Raises:
            RuntimeError: if FlashInfer's plan is laid out otherwise than `shorten` needs it, which is seen here, before
                any request.
        """
        self.sizes, self.device = sizes, device
        room = _room(sizes.max_requests)
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._query_starts = torch.zeros(room + 1, dtype=torch.int32, device=device)
        self._page_starts = torch.zeros(room + 1, dtype=torch.int32, device=device)
        self._pages = torch.zeros(room * sizes.max_pages, dtype=torch.int32, device=device)
        self._lengths = torch.zeros(room, dtype=torch.int32, device=device)
        self._wrappers: dict[int, Any] = {}
        self._staged: deque[Any] = deque(maxlen=STEPS_IN_FLIGHT * (1 + sizes.num_drafts))
        if sizes.num_drafts:
            self.plan(_step_of_one_token(device))

    def plan(self, step: DecodeStep) -> Any:
        """FlashInfer's wrapper, ready for `run`. It is the same object for each step that has room in it.

        Does not wait for the device.
        """
        sizes, n = self.sizes, step.length_bounds.shape[0]
        room = _room(n)
        query_starts, bounds = _with_padding(step)
        lengths = torch.zeros(room, dtype=torch.int32)
        lengths[:n] = bounds
        num_pages = (lengths + sizes.page_size - 1) // sizes.page_size
        page_starts = torch.zeros(room + 1, dtype=torch.int32)
        torch.cumsum(num_pages, 0, out=page_starts[1:])
        starts = torch.full((room + 1,), int(query_starts[-1]), dtype=torch.int32)
        starts[: n + 1] = query_starts
        wrapper = self._wrapper(room)
        wrapper.plan(
            metadata=_csr(starts, page_starts, self._pages_of(step, num_pages[:n], page_starts), lengths),
            num_heads=sizes.num_heads,
            head_dim_ckv=sizes.kv_lora_rank,
            head_dim_kpe=sizes.rope_dim,
            page_size=sizes.page_size,
            causal=True,
            sm_scale=sizes.softmax_scale,
            q_data_type=sizes.query_dtype,
            kv_data_type=sizes.cache_dtype,
            query_layout="split",
            kv_cache_layout="split",
        )
        planned = wrapper._planned_backend
        # The plan is copied from this buffer later, and the next plan would be given the same memory.
        self._staged.append(planned._pin_memory_int_workspace_buffer)
        if sizes.num_drafts:
            shorten(planned._plan_info, planned._int_workspace_buffer, self._query_starts[: n + 1], step.lengths)
        return wrapper

    def _pages_of(self, step: DecodeStep, num_pages: Tensor, page_starts: Tensor) -> Tensor:
        """int32 on the device: the pages of all requests in a row."""
        total = int(page_starts[-1])
        if total == 0:
            return self._pages[:1].clone()
        of_request = torch.repeat_interleave(torch.arange(len(num_pages)), num_pages.long(), output_size=total)
        in_request = torch.arange(total) - page_starts[:-1].long()[of_request]
        place = (of_request * step.block_table.stride(0) + in_request).to(self.device, non_blocking=True)
        flat = step.block_table.as_strided((int(step.block_table.stride(0)) * len(num_pages),), (1,))
        return flat[place]

    def _wrapper(self, room: int) -> Any:
        if room not in self._wrappers:
            from flashinfer.mla import BatchMLAPagedAttentionWrapper

            self._wrappers[room] = BatchMLAPagedAttentionWrapper(
                self._workspace,
                use_cuda_graph=True,
                qo_indptr=self._query_starts[: room + 1],
                kv_indptr=self._page_starts[: room + 1],
                kv_indices=self._pages,
                kv_len_arr=self._lengths[:room],
                backend="fa3",
            )
        return self._wrappers[room]


def _step_of_one_token(device: torch.device) -> DecodeStep:
    one = torch.ones(1, dtype=torch.int32)
    starts = torch.arange(2, dtype=torch.int32)
    return DecodeStep(starts, 1, one, one.to(device), torch.zeros(1, 1, dtype=torch.int32, device=device))


def _room(num_requests: int) -> int:
    return 1 << max(num_requests - 1, 0).bit_length()


def _with_padding(step: DecodeStep) -> tuple[Tensor, Tensor]:
    """Query starts and length bounds; requests of padding get queries, as a graph has them, but nothing to read."""
    n, starts = step.length_bounds.shape[0], step.query_starts
    counts = starts[1:] - starts[:-1]
    each = int(counts[0])
    is_padding = counts == 0
    if not bool(is_padding.any()):
        return starts, step.length_bounds
    if step.num_queries == n * each and bool(((counts == each) | is_padding).all()):
        starts = torch.arange(n + 1, dtype=torch.int32) * each
    return starts, step.length_bounds.masked_fill(is_padding, 0)


def _csr(query_starts: Tensor, page_starts: Tensor, pages: Tensor, lengths: Tensor) -> Any:
    from flashinfer.mla import MLAPlanMetadata

    return MLAPlanMetadata.csr(query_starts, page_starts, pages, lengths)


_FIELDS = 18
_QUERY_START, _PAGE_START, _LENGTH, _FROM, _UNTIL = 2, 3, 11, 13, 14
"""Places of fields in FlashInfer's `MLAPlanInfo` (scheduler.cuh, 0.7): byte offsets of arrays of int32 in the integer
workspace, one entry for each piece of work."""


def shorten(plan_info: Any, workspace: Tensor, query_starts: Tensor, lengths: Tensor) -> None:
    """Put the lengths that only the device knows into a plan that was made with upper bounds, on the device.

    FlashInfer writes lengths into its plan on the host, and reads no other. A piece of work that begins after its
    request's end becomes empty, which the kernel allows (vLLM's sparse backend for Hopper does the same).

    plan_info: 18 integers; workspace: uint8; query_starts: int32 [n + 1], on the device; lengths: int32 [n], likewise.

    Raises:
        RuntimeError: if FlashInfer's plan is laid out otherwise.
    """
    offsets = [int(offset) for offset in plan_info]
    if len(offsets) != _FIELDS:
        raise RuntimeError(
            f"FlashInfer's MLA plan has {len(offsets)} fields, wanted {_FIELDS} as in FlashInfer 0.7; "
            f"leave {requested.OPTIONS['flashinfer_mla']} out, so that vLLM's own MLA is used"
        )
    capacity = (offsets[_PAGE_START] - offsets[_QUERY_START]) // 4
    fields = workspace.view(torch.int32)

    def field(place: int) -> Tensor:
        return fields[offsets[place] // 4 :][:capacity]

    # Of places behind the last piece of work nothing is read; what stands there may be anything.
    request = torch.searchsorted(query_starts, field(_QUERY_START), right=True, out_int32=True) - 1
    length = lengths[request.clamp(0, lengths.shape[0] - 1)]
    field(_LENGTH).copy_(length)
    until = field(_UNTIL)
    until.copy_(torch.maximum(torch.minimum(until, length), field(_FROM)))
