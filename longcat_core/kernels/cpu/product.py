"""A dense projection in bf16, with sums in fp32. Reference: `torch.nn.functional.linear`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from longcat_core.kernels.cpu.library import is_available, library, multiplies_bf16, padded, require_bf16


def is_quicker(dtype: torch.dtype) -> bool:
    """Whether `product` is quicker here than torch's and the engines' own."""
    return dtype == torch.bfloat16 and is_available() and not multiplies_bf16()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x: bf16 [..., columns], of any strides; weight: bf16 [rows, columns]. Returns bf16 [..., rows].

    Raises:
        ValueError: for other dtypes, or a weight whose columns are not contiguous.
        RuntimeError: if the library is not there.
    """
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    require_bf16(x=flat, weight=weight)
    tokens, (rows, columns) = len(flat), weight.shape
    output = x.new_empty(*x.shape[:-1], rows)
    if tokens:
        scratch = torch.empty(tokens * padded(columns), dtype=torch.float32)
        library().longcat_product(
            output.data_ptr(),
            flat.data_ptr(),
            flat.stride(0),
            weight.data_ptr(),
            weight.stride(0),
            scratch.data_ptr(),
            tokens,
            rows,
            columns,
        )
    return output
