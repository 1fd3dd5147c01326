"""MLA over a paged latent cache in bf16, with scores and sums in fp32. Reference: `layers.latent_attention`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_core.kernels.cpu.library import GROUP, address_of, is_available, library, multiplies_bf16
from longcat_core.kernels.cpu.product import product
from longcat_core.kernels.cpu.prompt import attend_to_expanded
from longcat_core.layers import latent_attention
from longcat_core.layers.latent_attention import FEW_TOKENS, PagedBatch, UpProjection

_TOKENS_AT_ONCE = 64
"""New tokens of a call, which bounds the memory that it takes."""


class _Sizes(ctypes.Structure):
    """`Attention` of kernels.h."""

    _fields_: ClassVar[Any] = [
        *((name, ctypes.c_long) for name in ("requests", "queries", "heads", "nope", "rope", "latent", "value")),
        *((name, ctypes.c_long) for name in ("longest", "cache_stride", "query_stride")),
        ("scale", ctypes.c_float),
    ]


class GroupFields(ctypes.Structure):
    """`Group` of kernels.h."""

    _fields_: ClassVar[Any] = [
        ("attention", _Sizes),
        *((name, ctypes.c_void_p) for name in ("starts", "lengths", "table", "table_rows")),
        *((name, ctypes.c_long) for name in ("table_stride", "block_size")),
        ("trees", ctypes.c_void_p),
    ]


class Group(NamedTuple):
    """Requests with equally many new tokens, as the kernel takes them."""

    fields: GroupFields
    tensors: tuple[Tensor | None, ...]
    """Which the fields point into."""
    requests: Sequence[int]

    @classmethod
    def of(
        cls,
        batch: PagedBatch,
        requests: Sequence[int],
        up: UpProjection,
        cache: Tensor,
        rope: int,
        scale: float,
        starts: Sequence[int] | None = None,
        lengths: Tensor | None = None,
    ) -> Group:
        """starts: of the queries, one a request, and lengths: int64 [requests], contiguous, where these are not the
        batch's.

        Raises:
            ValueError: for a request whose context is not in the table.
        """
        new = batch.new_tokens(requests[0]) if starts is None else 1
        longest, rows = max(batch.seq_lens[request] for request in requests), batch.rows_of(requests)
        table, block_size = batch.block_table.int(), batch.block_size
        if max(rows) >= len(table) or longest > table.shape[1] * block_size:
            raise ValueError(
                f"a context of {longest} tokens in rows up to {max(rows)}: wanted at most the {len(table)} rows of "
                f"{table.shape[1]} blocks of {block_size} tokens that the table has"
            )
        table = table if table.stride(1) == 1 else table.contiguous()
        given = [batch.query_starts[request] for request in requests] if starts is None else starts
        of_requests = torch.tensor([given, [batch.seq_lens[request] for request in requests], rows])
        first, second, third = of_requests.unbind()
        lengths = second if lengths is None else lengths
        trees = None if batch.trees is None else batch.trees[torch.tensor(requests)].contiguous()
        heads, nope, latent = up.w_uk.shape
        sizes = len(requests), new, heads, nope, rope, latent, up.w_uv.shape[1]
        fields = GroupFields(
            _Sizes(*sizes, longest, cache.stride(0), heads * (nope + rope), scale),
            first.data_ptr(),
            lengths.data_ptr(),
            table.data_ptr(),
            third.data_ptr(),
            table.stride(0),
            block_size,
            address_of(trees),
        )
        return cls(fields, (of_requests, lengths, table, trees), requests)


def is_decoding(batch: PagedBatch, up: UpProjection) -> bool:
    """Whether the kernel takes a batch as a whole: not if there is nothing in it, or a prompt, which torch is for."""
    return bool(batch.requests) and not any(_is_for_torch(new, up) for new in batch.requests)


_last: tuple[PagedBatch, tuple[Any, ...], dict[int, list[Group]]] | None = None
"""Those of a step, which all layers share."""


def groups_of(batch: PagedBatch, new: int, up: UpProjection, cache: Tensor, rope: int, scale: float) -> list[Group]:
    """Of the requests with so many new tokens, which the kernel takes."""
    global _last
    key = (up.w_uk.shape, up.w_uv.shape, cache.stride(0), rope, scale)
    last = _last
    if last is None or last[0] is not batch or last[1] != key:
        _last = last = batch, key, {}
    found = last[2]
    if new not in found:
        found[new] = [Group.of(batch, part, up, cache, rope, scale) for part in _at_once(batch, new)]
    return found[new]


def paged_attention(
    queries: Tensor, cache: Tensor, batch: PagedBatch, up: UpProjection, softmax_scale: float
) -> Tensor:
    """As the reference: decoding and verification by the compiled kernel, where it is there and takes dtypes and sizes,
    the rest by torch."""
    if queries.dtype != torch.bfloat16 or cache.dtype != torch.bfloat16 or not takes(up):
        return latent_attention.paged_attention(queries, cache, batch, up, softmax_scale)
    linear = F.linear if multiplies_bf16() else product
    output = queries.new_empty(queries.shape[0], queries.shape[1], up.w_uv.shape[1])
    for new in batch.requests:
        if _is_for_torch(new, up):
            for group in batch.groups_of(new):
                latent_attention.attend(output, queries, cache, group, up, softmax_scale, linear, attend_to_expanded)
        else:
            for each in groups_of(batch, new, up, cache, queries.shape[-1] - up.w_uk.shape[1], softmax_scale):
                _attend(output, queries, cache, each, up)
    return output


def _is_for_torch(new: int, up: UpProjection) -> bool:
    return new > FEW_TOKENS or latent_attention.is_prefill(new, up)


def _at_once(batch: PagedBatch, new: int) -> Iterator[Sequence[int]]:
    """The requests with so many new tokens, a call's worth at a time."""
    requests, step = batch.requests[new], max(1, _TOKENS_AT_ONCE // new)
    return (requests[first : first + step] for first in range(0, len(requests), step))


def write_latents(cache: Tensor, latents: Tensor, rope_keys: Tensor, slots: Tensor) -> None:
    """As the reference, by the compiled kernel where it is there and takes dtypes and strides.

    Raises:
        ValueError: if there are not as many slots as latents and keys.
    """
    if not len(slots) == len(latents) == len(rope_keys):
        raise ValueError(f"{len(latents)} latents and {len(rope_keys)} keys for {len(slots)} slots, wanted as many")
    tensors = (cache, latents, rope_keys)
    if not is_available() or any(t.dtype != torch.bfloat16 or t.stride(-1) != 1 for t in tensors):
        latent_attention.write_latents(cache, latents, rope_keys, slots)
        return
    slots = slots.long().contiguous()
    library().longcat_write_latents(
        cache.data_ptr(),
        cache.stride(0),
        latents.data_ptr(),
        latents.stride(0),
        rope_keys.data_ptr(),
        rope_keys.stride(0),
        slots.data_ptr(),
        len(slots),
        latents.shape[1],
        rope_keys.shape[1],
    )


def takes(up: UpProjection) -> bool:
    """Whether the kernel is there, and takes queries and a cache in bf16 with these weights."""
    return is_available() and up.w_uk.dtype == up.w_uv.dtype == torch.bfloat16 and up.w_uk.shape[2] % GROUP == 0


def _attend(output: Tensor, queries: Tensor, cache: Tensor, group: Group, up: UpProjection) -> None:
    w_uk, w_uv, queries = up.w_uk.transpose(1, 2).contiguous(), up.w_uv.contiguous(), queries.contiguous()
    scratch_size = library().longcat_attention_scratch(ctypes.byref(group.fields.attention))
    scratch = torch.empty(scratch_size, dtype=torch.float32)
    library().longcat_attention(
        ctypes.byref(group.fields),
        output.data_ptr(),
        queries.data_ptr(),
        cache.data_ptr(),
        w_uk.data_ptr(),
        w_uv.data_ptr(),
        scratch.data_ptr(),
    )
