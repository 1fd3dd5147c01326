"""FFN experts over arranged rows, for NVIDIA GPUs. Reference: `layers.experts.grouped_ffn`.

Two products: gate and up with SiLU and multiplication, then down. Where rows are few, a weight is read once and time is
that of reading it; a choice of -1 has no row in either.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from longcat_core.kernels.arrange import Arrangement
from longcat_core.kernels.quantize import GROUP, quantize, quantize_tile
from longcat_core.kernels.tiles import Tile
from longcat_core.weights.blocks import scale_shape


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of a rank's experts, contiguous, in one dtype; in FP8 (e4m3) with fp32 scales of 128 x 128 blocks."""

    w13: Tensor
    """[E, 2 I, H], gate above up."""
    w2: Tensor
    """[E, H, I]."""
    w13_scales: Tensor | None = None
    """fp32 [E, 2 I / 128, ceil(H / 128)]: I is a multiple of 128."""
    w2_scales: Tensor | None = None
    """fp32 [E, ceil(H / 128), I / 128]."""

    def __post_init__(self) -> None:
        experts, hidden_size, inner_size = self.w2.shape
        found, wanted = tuple(self.w13.shape), (experts, 2 * inner_size, hidden_size)
        if found != wanted:
            raise ValueError(f"w13 of shape {found} with w2 of {tuple(self.w2.shape)}: wanted {wanted}")
        if not self.is_fp8:
            return
        if inner_size % GROUP:
            raise ValueError(f"FP8 experts of inner size {inner_size}: wanted a multiple of {GROUP}")
        for weight, scales in ((self.w13, self.w13_scales), (self.w2, self.w2_scales)):
            of_blocks = (experts, *scale_shape(weight.shape[1:], (GROUP, GROUP)))
            if scales is None or scales.shape != of_blocks:
                given = None if scales is None else tuple(scales.shape)
                raise ValueError(f"scales {given} of a weight of shape {tuple(weight.shape)}: wanted {of_blocks}")

    @property
    def is_fp8(self) -> bool:
        return self.w13.dtype == torch.float8_e4m3fn

    @property
    def precision(self) -> str:
        """As `tiles.TILES` names it."""
        return "fp8" if self.is_fp8 else f"{8 * self.w13.element_size()} bit"


@triton.jit
def _tile(numbers: tl.tensor, rows: tl.tensor, is_row: tl.tensor, depths: tl.tensor, n_depths: tl.tensor) -> tl.tensor:
    """[rows, depths] of a matrix with n_depths columns; 0 where there are none."""
    mask = is_row[:, None] & (depths < n_depths)[None, :]
    return tl.load(numbers + rows[:, None] * n_depths + depths[None, :], mask=mask, other=0.0)


@triton.jit
def _block(slots: tl.tensor, experts: tl.tensor, n_choices: tl.tensor, block_rows: tl.constexpr) -> tl.tuple:
    """The rows of this program's block, which of them are choices, and the expert of all of them."""
    block = tl.program_id(0)
    own = tl.load(slots + block * block_rows + tl.arange(0, block_rows)).to(tl.int64)
    is_row = own < n_choices
    expert = tl.load(experts + block).to(tl.int64)
    return own, is_row, expert


@triton.jit
def _zeros(block_rows: tl.constexpr, block_columns: tl.constexpr, is_swapped: tl.constexpr) -> tl.tensor:
    """fp32 [R, C], or [C, R] where swapped."""
    if is_swapped:
        total = tl.zeros([block_columns, block_rows], dtype=tl.float32)
    else:
        total = tl.zeros([block_rows, block_columns], dtype=tl.float32)
    return total


@triton.jit
def _add_product(
    total: tl.tensor,
    rows: tl.tensor,
    weights: tl.tensor,
    row_scales: tl.tensor,
    weight_scale: tl.tensor,
    is_fp8: tl.constexpr,
    is_swapped: tl.constexpr,
) -> tl.tensor:
    """total + rows [R, D] @ weights [C, D].T times their scales: [R, C], or [C, R] where swapped."""
    if is_fp8:
        if is_swapped:
            total += tl.dot(weights, tl.trans(rows)) * (row_scales * weight_scale)[None, :]
        else:
            total += tl.dot(rows, tl.trans(weights)) * (row_scales * weight_scale)[:, None]
    else:
        if is_swapped:
            total = tl.dot(weights, tl.trans(rows), total, input_precision="ieee")
        else:
            total = tl.dot(rows, tl.trans(weights), total, input_precision="ieee")
    return total


@triton.jit
def gate_up_kernel(
    hidden_states: tl.tensor,
    hidden_scales: tl.tensor,
    w13: tl.tensor,
    w13_scales: tl.tensor,
    slots: tl.tensor,
    experts: tl.tensor,
    used_rows: tl.tensor,
    inner: tl.tensor,
    inner_scales: tl.tensor,
    n_choices: tl.tensor,
    top_k: tl.tensor,
    hidden_size: tl.tensor,
    inner_size: tl.tensor,
    is_fp8: tl.constexpr,
    is_swapped: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_depth: tl.constexpr,
) -> None:
    """silu(gate) * up of one block of rows and some columns a program; in FP8, quantised for the next product."""
    if tl.program_id(0) * block_rows >= tl.load(used_rows):
        return
    own, is_row, expert = _block(slots, experts, n_choices, block_rows)
    tokens = own // top_k
    columns = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
    is_column = columns < inner_size
    weights = w13 + expert * 2 * inner_size * hidden_size
    n_groups = tl.cdiv(hidden_size, block_depth)
    gate = _zeros(block_rows, block_columns, is_swapped)
    up = tl.zeros_like(gate)
    row_scales = tl.zeros([block_rows], dtype=tl.float32)
    gate_scale = 0.0
    up_scale = 0.0
    for group in range(n_groups):
        depths = group * block_depth + tl.arange(0, block_depth)
        rows = _tile(hidden_states, tokens, is_row, depths, hidden_size)
        of_gate = _tile(weights, columns, is_column, depths, hidden_size)
        of_up = _tile(weights, inner_size + columns, is_column, depths, hidden_size)
        if is_fp8:
            row_scales = tl.load(hidden_scales + tokens * n_groups + group, mask=is_row, other=0.0)
            of_expert = expert * 2 * tl.num_programs(1) + tl.program_id(1)
            gate_scale = tl.load(w13_scales + of_expert * n_groups + group)
            up_scale = tl.load(w13_scales + (of_expert + tl.num_programs(1)) * n_groups + group)
        gate = _add_product(gate, rows, of_gate, row_scales, gate_scale, is_fp8, is_swapped)
        up = _add_product(up, rows, of_up, row_scales, up_scale, is_fp8, is_swapped)
    active = gate * tl.sigmoid(gate) * up
    if is_swapped:
        active = tl.trans(active)
    places = inner + own[:, None] * inner_size + columns[None, :]
    if is_fp8:
        codes, scales = quantize_tile(active)
        tl.store(places, codes, mask=is_row[:, None] & is_column[None, :])
        tl.store(inner_scales + own * tl.num_programs(1) + tl.program_id(1), scales, mask=is_row)
    else:
        tl.store(places, active.to(inner.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def down_kernel(
    inner: tl.tensor,
    inner_scales: tl.tensor,
    w2: tl.tensor,
    w2_scales: tl.tensor,
    slots: tl.tensor,
    experts: tl.tensor,
    used_rows: tl.tensor,
    outputs: tl.tensor,
    n_choices: tl.tensor,
    hidden_size: tl.tensor,
    inner_size: tl.tensor,
    is_fp8: tl.constexpr,
    is_swapped: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_depth: tl.constexpr,
) -> None:
    """The second product of one block of rows and some columns a program."""
    if tl.program_id(0) * block_rows >= tl.load(used_rows):
        return
    own, is_row, expert = _block(slots, experts, n_choices, block_rows)
    columns = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
    is_column = columns < hidden_size
    weights = w2 + expert * hidden_size * inner_size
    n_groups = tl.cdiv(inner_size, block_depth)
    total = _zeros(block_rows, block_columns, is_swapped)
    row_scales = tl.zeros([block_rows], dtype=tl.float32)
    weight_scale = 0.0
    for group in range(n_groups):
        depths = group * block_depth + tl.arange(0, block_depth)
        rows = _tile(inner, own, is_row, depths, inner_size)
        of_columns = _tile(weights, columns, is_column, depths, inner_size)
        if is_fp8:
            row_scales = tl.load(inner_scales + own * n_groups + group, mask=is_row, other=0.0)
            of_expert = expert * tl.num_programs(1) + tl.program_id(1)
            weight_scale = tl.load(w2_scales + of_expert * n_groups + group)
        total = _add_product(total, rows, of_columns, row_scales, weight_scale, is_fp8, is_swapped)
    if is_swapped:
        total = tl.trans(total)
    places = outputs + own[:, None] * hidden_size + columns[None, :]
    tl.store(places, total.to(outputs.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def inner_bytes(choices: int, dtype: torch.dtype, weights: ExpertWeights) -> int:
    """Memory between the products for so many choices: in x's dtype, or in FP8 with the scales behind the codes."""
    inner_size = weights.w2.shape[2]
    bytes_of_a_choice = inner_size + inner_size // GROUP * 4 if weights.is_fp8 else inner_size * dtype.itemsize
    return choices * bytes_of_a_choice


def expert_outputs(
    hidden_states: Tensor,
    arrangement: Arrangement,
    weights: ExpertWeights,
    tile: Tile,
    inner: Tensor | None = None,
    outputs: Tensor | None = None,
) -> Tensor:
    """FFN_e(x) of each choice: [T, K, H] in x's dtype, unweighted; undefined for choices that are not arranged.

    Products are summed in fp32, for one tile in the same order whatever the batch. What is between the products is
    rounded once, to x's dtype or to FP8 with a scale for each 128. In FP8, x is quantised the same way first.

    hidden_states: [T, H], contiguous, in the weights' dtype unless they are in FP8; arrangement: of ids [T, K] in
    blocks of `tile.rows`; inner: at least `inner_bytes` of memory between the products, of any contiguous dtype;
    outputs: what is returned, [T, K, H], contiguous. Both are allocated if they are not given.

    Raises:
        ValueError: if hidden states have another shape or dtype, the tile suits neither the arrangement nor FP8, or
            memory that is given is too little.
    """
    tokens, top_k = arrangement.local_ids.shape
    choices = tokens * top_k
    _, hidden_size, inner_size = weights.w2.shape
    if arrangement.slots.numel() != arrangement.experts.numel() * tile.rows:
        found = f"{arrangement.slots.numel()} rows in {arrangement.experts.numel()} blocks"
        raise ValueError(f"{found}: wanted blocks of {tile.rows} rows, as the tile has")
    if hidden_states.shape != (tokens, hidden_size) or not hidden_states.is_contiguous():
        found = f"{tuple(hidden_states.shape)}, strides {hidden_states.stride()}"
        raise ValueError(f"hidden states {found}: wanted {(tokens, hidden_size)}, contiguous")
    if weights.is_fp8 and (tile.columns, tile.depth) != (GROUP, GROUP):
        raise ValueError(f"{tile} for FP8: wanted {GROUP} columns and a depth of {GROUP}")
    if not weights.is_fp8 and hidden_states.dtype != weights.w13.dtype:
        raise ValueError(f"hidden states in {hidden_states.dtype}: wanted {weights.w13.dtype}, as the weights are in")
    wanted = inner_bytes(choices, hidden_states.dtype, weights)
    if inner is None:
        inner = hidden_states.new_empty(wanted, dtype=torch.uint8)
    if outputs is None:
        outputs = hidden_states.new_empty(tokens, top_k, hidden_size)
    if inner.nbytes < wanted or outputs.shape != (tokens, top_k, hidden_size) or outputs.dtype != hidden_states.dtype:
        found = f"{inner.nbytes} bytes, and outputs {tuple(outputs.shape)} in {outputs.dtype}"
        raise ValueError(f"{found}: wanted {wanted}, and {(tokens, top_k, hidden_size)} in {hidden_states.dtype}")
    rows, row_scales, inner_scales = hidden_states, None, None
    inner = inner.view(-1).view(torch.uint8)
    if weights.is_fp8:
        rows, row_scales = quantize(hidden_states)
        inner_scales = inner[choices * inner_size : wanted].view(torch.float32)
        inner = inner[: choices * inner_size]
    inner = inner[:wanted].view(rows.dtype)
    blocks = arrangement.experts.numel()
    of_blocks = (arrangement.slots, arrangement.experts, arrangement.used_rows)
    options = {
        "is_fp8": weights.is_fp8,
        "is_swapped": tile.is_swapped,
        "block_rows": tile.rows,
        "block_columns": tile.columns,
        "block_depth": tile.depth,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    gate_up_kernel[(blocks, triton.cdiv(inner_size, tile.columns))](
        rows,
        row_scales,
        weights.w13,
        weights.w13_scales,
        *of_blocks,
        inner,
        inner_scales,
        choices,
        top_k,
        hidden_size,
        inner_size,
        **options,
    )
    down_kernel[(blocks, triton.cdiv(hidden_size, tile.columns))](
        inner,
        inner_scales,
        weights.w2,
        weights.w2_scales,
        *of_blocks,
        outputs,
        choices,
        hidden_size,
        inner_size,
        **options,
    )
    return outputs
