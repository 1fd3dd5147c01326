"""A dense projection in bf16 or FP8, with sums in fp32. Reference: `torch.nn.functional.linear`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longcat_core.kernels.cpu.library import (
    address_of,
    is_available,
    library,
    multiplies_bf16,
    padded,
    require_bf16,
    require_weight,
)

FEW_ROWS = 32
"""Up to so many, torch is slower than `product` on a processor with products in bf16, too: measured on an AMD EPYC with
AVX512-BF16."""


class Projection(NamedTuple):
    weight: Tensor
    """[rows, columns]: bf16, or FP8 (e4m3) with scales."""
    scales: Tensor | None = None
    """fp32 [ceil(rows / 128), ceil(columns / 128)]"""


def is_quicker(dtype: torch.dtype) -> bool:
    """Whether `product` is quicker here than torch's and the engines' own."""
    return dtype == torch.bfloat16 and is_available() and not multiplies_bf16()


def is_quicker_than_torch(dtype: torch.dtype, rows: int) -> bool:
    """The same for so many rows of x, beside `torch.nn.functional.linear`, whose weight is not packed beforehand."""
    return is_quicker(dtype) or (dtype == torch.bfloat16 and is_available() and rows <= FEW_ROWS)


def takes_fp8(dtype: torch.dtype) -> bool:
    """Whether `product` and `experts.routed_experts` multiply activations of this dtype by weights in FP8 here."""
    return dtype == torch.bfloat16 and is_available()


def product(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    """x: bf16 [..., columns], of any strides; weight: [rows, columns], bf16, or FP8 (e4m3) with scales: fp32, one for
    each block of 128 x 128, by which its numbers are multiplied in fp32. Returns bf16 [..., rows].

    Raises:
        ValueError: for other dtypes or sizes, or a weight whose columns are not contiguous.
        RuntimeError: if the library is not there.
    """
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    require_bf16(x=flat)
    require_weight("weight", weight, scales)
    tokens, (rows, columns) = len(flat), weight.shape
    if flat.shape[1] != columns:
        raise ValueError(f"x: {flat.shape[1]} columns, wanted {columns} as weight has")
    output = x.new_empty(*x.shape[:-1], rows)
    if tokens:
        scratch = torch.empty(tokens * padded(columns), dtype=torch.float32)
        library().longcat_product(
            output.data_ptr(),
            flat.data_ptr(),
            flat.stride(0),
            weight.data_ptr(),
            weight.stride(0),
            address_of(scales),
            scratch.data_ptr(),
            tokens,
            rows,
            columns,
        )
    return output


def choose(x: Tensor, weight: Tensor) -> Tensor:
    """`product(x, weight).argmax(dim=-1)`, without the products in memory. NaN is never the greatest.

    x: bf16 [T, columns]; weight: bf16 [rows, columns], contiguous. Returns int64 [T], of equal products the first.

    Raises:
        ValueError: for other dtypes, sizes or strides.
        RuntimeError: if the library is not there.
    """
    require_bf16(x=x, weight=weight)
    tokens, (rows, columns) = len(x), weight.shape
    if x.shape[1] != columns or not weight.is_contiguous() or not rows:
        raise ValueError(f"x {[*x.shape]}, weight {[*weight.shape]}: wanted [T, {columns}] and contiguous rows")
    chosen = torch.empty(tokens, dtype=torch.int64)
    scratch = torch.empty(tokens * padded(columns), dtype=torch.float32)
    library().longcat_choose(
        chosen.data_ptr(),
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        scratch.data_ptr(),
        tokens,
        rows,
        columns,
    )
    return chosen
