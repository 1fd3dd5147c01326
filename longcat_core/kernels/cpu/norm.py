"""RMSNorm in bf16, with sums in fp32 and one rounding. Reference: `torch.nn.functional.rms_norm`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from longcat_core.kernels.cpu.library import is_available, library, require_bf16


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is there and takes these rows."""
    return is_available() and x.dtype == weight.dtype == torch.bfloat16 and x.dim() == 2 and x.stride(1) == 1


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x: bf16 [T, H], of any stride between rows; weight: bf16 [H]. Returns bf16 [T, H].

    Raises:
        ValueError: for other dtypes, or rows that are not contiguous.
        RuntimeError: if the library is not there.
    """
    require_bf16(x=x, weight=weight)
    output = x.new_empty(x.shape)
    library().longcat_rms_norm(
        output.data_ptr(), None, x.data_ptr(), x.stride(0), None, 0, weight.data_ptr(), epsilon, *x.shape
    )
    return output


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm of `x + residual`, which is not rounded before, and that sum: bf16 [T, H] both. As `rms_norm`."""
    require_bf16(x=x, residual=residual, weight=weight)
    if residual.shape != x.shape:
        raise ValueError(f"residual: {[*residual.shape]}, wanted {[*x.shape]} as x has")
    output, both = x.new_empty(x.shape), x.new_empty(x.shape)
    library().longcat_rms_norm(
        output.data_ptr(),
        both.data_ptr(),
        x.data_ptr(),
        x.stride(0),
        residual.data_ptr(),
        residual.stride(0),
        weight.data_ptr(),
        epsilon,
        *x.shape,
    )
    return output, both
