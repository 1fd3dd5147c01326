"""Rotary embedding of queries and keys in bf16. Reference: `layers.rotary.rotate`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from longcat_core.kernels.cpu.library import is_available, library
from longcat_core.layers import rotary


def rotate(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference, and in place where the compiled kernel is there and takes them. torch.compile gets the
    reference, which it fuses with what is around it."""
    if torch.compiler.is_compiling() or not _takes(queries, keys, cos, sin):
        return rotary.rotate(queries, keys, cos, sin)
    for x in (queries[..., queries.shape[-1] - keys.shape[-1] :], keys):
        library().longcat_rotate(
            x.data_ptr(), *x.stride()[:2], cos.data_ptr(), sin.data_ptr(), *x.shape[:2], cos.shape[-1]
        )
    return queries, keys


def _takes(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if not is_available() or queries.dtype != torch.bfloat16 or keys.dtype != torch.bfloat16:
        return False
    return queries.stride(-1) == keys.stride(-1) == 1 and cos.is_contiguous() and sin.is_contiguous()
