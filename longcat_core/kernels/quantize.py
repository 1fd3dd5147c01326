"""Activations in FP8 with a scale for each 128, for NVIDIA GPUs. Reference: `weights.blocks.quantize_blocks`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 128
"""Numbers of a row that share a scale."""
_LIMIT = tl.constexpr(448.0)
"""The greatest number of e4m3."""


@triton.jit
def quantize_tile(numbers: tl.tensor) -> tl.tuple:
    """fp32 [rows, 128] as FP8 with fp32 scales [rows]: the greatest magnitude over 448, or 1 if all are 0.

    Divisions are rounded to the nearest, as the reference's: `/` alone is an approximation on a GPU.
    """
    greatest = tl.max(tl.abs(numbers), axis=1)
    scales = tl.where(greatest > 0, tl.div_rn(greatest, _LIMIT), 1.0)
    return tl.div_rn(numbers, scales[:, None]).to(tl.float8e4nv), scales


@triton.jit
def quantize_kernel(
    rows: tl.tensor,
    quantized: tl.tensor,
    scales: tl.tensor,
    n_columns: tl.tensor,
    group: tl.constexpr,
    groups_of_a_program: tl.constexpr,
) -> None:
    """A few groups of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * groups_of_a_program + tl.arange(0, groups_of_a_program)
    columns = groups[:, None] * group + tl.arange(0, group)[None, :]
    places = row * n_columns + columns
    numbers = tl.load(rows + places, mask=columns < n_columns, other=0.0).to(tl.float32)
    codes, of_groups = quantize_tile(numbers)
    tl.store(quantized + places, codes, mask=columns < n_columns)
    n_groups = (n_columns + group - 1) // group
    tl.store(scales + row * n_groups + groups, of_groups, mask=groups < n_groups)


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, C] of any float type, contiguous, as FP8 (e4m3) [R, C] and scales, fp32 [R, ceil(C / 128)].

    Raises:
        ValueError: if rows are not contiguous.
    """
    if not rows.is_contiguous():
        raise ValueError(f"rows of strides {rows.stride()}: wanted a contiguous tensor")
    n_rows, n_columns = rows.shape
    n_groups = triton.cdiv(n_columns, GROUP)
    quantized = torch.empty_like(rows, dtype=torch.float8_e4m3fn)
    scales = rows.new_empty(n_rows, n_groups, dtype=torch.float32)
    of_a_program = min(16, triton.next_power_of_2(n_groups))
    quantize_kernel[(n_rows, triton.cdiv(n_groups, of_a_program))](
        rows, quantized, scales, n_columns, group=GROUP, groups_of_a_program=of_a_program, num_warps=4
    )
    return quantized, scales
