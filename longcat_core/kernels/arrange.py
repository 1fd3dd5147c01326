"""Rows by expert, in blocks of one expert each, for NVIDIA GPUs. Reference: `arrange_reference` below.

It gives what vLLM's `moe_align_block_size` gives, without rows of -1, and in a fixed order.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_EXPERTS = 1024
ONE_LAUNCH = 1024
"""Up to as many choices one launch does; more take three."""
_CHUNK = 1024
_ROWS = 32
"""Choices that a program places."""
_COMPARED = 128
"""Choices or experts that they are compared with at a time."""


class Arrangement(NamedTuple):
    """Choices of local experts as blocks of GEMM rows: all of a block are of one expert, its last rows may be padding.

    Shapes are those of the worst case, so that a graph can be captured; what was really used is on the device.
    """

    slots: Tensor
    """int32 [blocks x block_rows]: `token * K + column` of each row, ascending for each expert, or T x K for padding.
    What is at and behind `used_rows` is undefined."""
    experts: Tensor
    """int32 [blocks]: the local expert of each block, ascending. Undefined where `slots` is."""
    used_rows: Tensor
    """int32 [1]: rows of all blocks that have any, padding included: a multiple of block_rows."""
    local_ids: Tensor
    """int32 [T, K]: the local expert of each choice, or -1 if it has no row."""


def worst_case_rows(choices: int, num_experts: int, block_rows: int) -> int:
    """Rows that any routing of so many choices fits into: a multiple of block_rows."""
    return min(choices, (choices + num_experts * (block_rows - 1)) // block_rows) * block_rows


def arrange_reference(
    ids: Tensor, num_experts: int, block_rows: int, expert_map: Tensor | None = None
) -> tuple[list[int], list[int], int]:
    """The defined part of `slots` and `experts`, and `used_rows`, in plain PyTorch."""
    flat = ids.flatten().long()
    if expert_map is not None:
        flat = torch.where(flat >= 0, expert_map[flat.clamp(min=0)].long(), -1)
    slots, experts = [], []
    for expert in range(num_experts):
        own = (flat == expert).nonzero().flatten().tolist()
        blocks = -(-len(own) // block_rows)
        slots += own + [flat.numel()] * (blocks * block_rows - len(own))
        experts += [expert] * blocks
    return slots, experts, len(slots)


@triton.jit
def _local_experts(
    ids: tl.tensor, expert_map: tl.tensor, slots: tl.tensor, end: tl.tensor, has_map: tl.constexpr
) -> tl.tensor:
    """The local experts of slots before `end`; -1 for those behind, and for what no expert of this rank has."""
    experts = tl.load(ids + slots, mask=slots < end, other=-1)
    if has_map:
        experts = tl.load(expert_map + experts, mask=experts >= 0, other=-1)
    return experts


@triton.jit
def count_kernel(
    ids: tl.tensor,
    expert_map: tl.tensor,
    counts: tl.tensor,
    n_choices: tl.tensor,
    has_map: tl.constexpr,
    padded_experts: tl.constexpr,
    chunk: tl.constexpr,
) -> None:
    """Rows of each expert in one chunk of choices a program: counts [chunks, padded_experts]."""
    slots = tl.program_id(0) * chunk + tl.arange(0, chunk)
    experts = _local_experts(ids, expert_map, slots, n_choices, has_map)
    rows = tl.histogram(tl.maximum(experts, 0), padded_experts, mask=experts >= 0)
    tl.store(counts + tl.program_id(0) * padded_experts + tl.arange(0, padded_experts), rows)


@triton.jit
def sum_kernel(
    counts: tl.tensor,
    totals: tl.tensor,
    n_chunks: tl.tensor,
    padded_experts: tl.constexpr,
    padded_chunks: tl.constexpr,
    experts_of_a_program: tl.constexpr,
) -> None:
    """Counts become those of all chunks before, for a few experts a program; totals [padded_experts]."""
    chunks = tl.arange(0, padded_chunks)[:, None]
    experts = tl.program_id(0) * experts_of_a_program + tl.arange(0, experts_of_a_program)
    places = counts + chunks * padded_experts + experts[None, :]
    rows = tl.load(places, mask=chunks < n_chunks, other=0)
    tl.store(places, tl.cumsum(rows, axis=0) - rows, mask=chunks < n_chunks)
    tl.store(totals + experts, tl.sum(rows, axis=0))


@triton.jit
def place_kernel(
    ids: tl.tensor,
    expert_map: tl.tensor,
    before: tl.tensor,
    totals: tl.tensor,
    slots: tl.tensor,
    block_experts: tl.tensor,
    used_rows: tl.tensor,
    local_ids: tl.tensor,
    n_choices: tl.tensor,
    has_map: tl.constexpr,
    is_alone: tl.constexpr,
    block_rows: tl.constexpr,
    padded_experts: tl.constexpr,
    chunk: tl.constexpr,
    rows_of_a_program: tl.constexpr,
    compared: tl.constexpr,
) -> None:
    """Where each choice goes: a few of one chunk a program, which works out for itself where each expert begins.

    `is_alone`: there is one chunk, and no kernel has counted before.
    """
    every_expert = tl.arange(0, padded_experts)
    own = tl.program_id(0) * rows_of_a_program + tl.arange(0, rows_of_a_program)
    first = tl.program_id(0) * rows_of_a_program // chunk * chunk
    experts = _local_experts(ids, expert_map, own, n_choices, has_map)
    is_chosen = experts >= 0
    if is_alone:
        everyone = _local_experts(ids, expert_map, tl.arange(0, chunk), n_choices, has_map)
        rows = tl.histogram(tl.maximum(everyone, 0), padded_experts, mask=everyone >= 0)
        rank = tl.zeros([rows_of_a_program], dtype=tl.int32)
    else:
        rows = tl.load(totals + every_expert)
        rank = tl.load(before + first // chunk * padded_experts + experts, mask=is_chosen, other=0)
    padded = (rows + block_rows - 1) // block_rows * block_rows
    ends = tl.cumsum(padded, axis=0)
    starts = ends - padded

    # How many of the same expert are before it in its chunk.
    for start in range(first, tl.program_id(0) * rows_of_a_program + rows_of_a_program, compared):
        others = start + tl.arange(0, compared)
        same = _local_experts(ids, expert_map, others, n_choices, has_map)[None, :] == experts[:, None]
        rank += tl.sum((same & (others[None, :] < own[:, None])).to(tl.int32), axis=1)
    position = rank + tl.gather(starts, tl.maximum(experts, 0), axis=0)
    tl.store(slots + position, own, mask=is_chosen)
    tl.store(local_ids + own, experts, mask=own < n_choices)
    tl.store(block_experts + position // block_rows, experts, mask=is_chosen)  # rows of a block all write the same

    if tl.program_id(0) == 0:
        tl.store(used_rows, tl.sum(padded, axis=0))
        for row in range(block_rows - 1):  # an expert has one row at least, or no block
            place = starts + rows + row
            tl.store(slots + place, n_choices + tl.zeros_like(place), mask=place < ends)


def arrange(ids: Tensor, num_experts: int, block_rows: int, expert_map: Tensor | None = None) -> Arrangement:
    """Rows of each of num_experts local experts, in blocks; choices of -1, or of other ranks' experts, have none.

    One launch up to 1,024 choices, three for more, without waiting for the device. The same ids always give the same
    order.

    ids: int32 [T, K] as in `Routing`; expert_map: int32 [global experts], the local number or -1 if another rank has
    that expert.

    Raises:
        ValueError: for more than 1,024 experts, a block that is no power of two, or ids that are not contiguous.
    """
    if not 0 < num_experts <= MAX_EXPERTS:
        raise ValueError(f"{num_experts} local experts: wanted 1 to {MAX_EXPERTS}")
    if block_rows < 1 or block_rows & (block_rows - 1):
        raise ValueError(f"blocks of {block_rows} rows: wanted a power of two")
    if ids.dtype != torch.int32 or not ids.is_contiguous():
        raise ValueError(f"ids of {ids.dtype}, strides {ids.stride()}: wanted contiguous int32")
    choices = ids.numel()
    rows = worst_case_rows(choices, num_experts, block_rows)
    arrangement = Arrangement(
        slots=ids.new_empty(rows),
        experts=ids.new_empty(rows // block_rows),
        used_rows=ids.new_empty(1),
        local_ids=torch.empty_like(ids),
    )
    padded_experts = max(16, triton.next_power_of_2(num_experts))
    is_alone = choices <= ONE_LAUNCH
    chunk = max(_ROWS, triton.next_power_of_2(choices)) if is_alone else _CHUNK
    chunks = triton.cdiv(choices, chunk)
    known = expert_map if expert_map is not None else ids
    sizes = {"has_map": expert_map is not None, "padded_experts": padded_experts, "chunk": chunk}
    before = totals = ids
    if not is_alone:
        before, totals = ids.new_empty(chunks, padded_experts), ids.new_empty(padded_experts)
        of_a_program = min(8, padded_experts)
        count_kernel[(chunks,)](ids, known, before, choices, **sizes, num_warps=4)
        sum_kernel[(padded_experts // of_a_program,)](
            before,
            totals,
            chunks,
            padded_experts=padded_experts,
            padded_chunks=triton.next_power_of_2(chunks),
            experts_of_a_program=of_a_program,
            num_warps=4,
        )
    place_kernel[(max(1, triton.cdiv(choices, _ROWS)),)](
        ids,
        known,
        before,
        totals,
        *arrangement,
        choices,
        **sizes,
        is_alone=is_alone,
        block_rows=block_rows,
        rows_of_a_program=_ROWS,
        compared=min(chunk, _COMPARED),
        num_warps=4,
    )
    return arrangement
