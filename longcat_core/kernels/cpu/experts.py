"""All FFN experts of a layer in one call, in bf16, with sums in fp32. Reference: `layers.experts.routed_experts`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from longcat_core.kernels.cpu.library import library, padded, require_bf16
from longcat_core.layers.experts import SparseFFN


class CompiledExperts(SparseFFN):
    """`routed_experts` with its weights. w13: bf16 [E, 2 I, H], gate above up; w2: bf16 [E, H, I]."""

    def __init__(self, w13: Tensor, w2: Tensor) -> None:
        self._w13, self._w2 = w13, w2

    def __call__(self, rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        return routed_experts(rows, experts, weights, self._w13, self._w2)


def routed_experts(hidden_states: Tensor, ids: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """`sum_k w_k FFN_k(x)`: bf16 [T, H]. Weights are read as they are published, once for all rows of an expert.

    hidden_states: bf16 [T, H]; ids: int32 [T, K], of these experts, or -1 for none, which costs nothing; weights: fp32
    [T, K]; w13: bf16 [E, 2 I, H], gate above up; w2: bf16 [E, H, I].

    Raises:
        ValueError: for other dtypes or strides.
        RuntimeError: if the library is not there.
    """
    require_bf16(hidden_states=hidden_states, w13=w13, w2=w2)
    if not (w13.is_contiguous() and w2.is_contiguous()):
        raise ValueError(f"w13, w2: strides {w13.stride()} and {w2.stride()}, wanted contiguous ones")
    (tokens, hidden), (experts, _, inner), top_k = hidden_states.shape, w2.shape, ids.shape[1]
    output = hidden_states.new_empty(tokens, hidden)
    if tokens:
        ids, weights = ids.int().contiguous(), weights.float().contiguous()
        scratch = torch.empty(tokens * (padded(hidden) + top_k * padded(inner)), dtype=torch.float32)
        library().longcat_experts(
            output.data_ptr(),
            hidden_states.data_ptr(),
            hidden_states.stride(0),
            ids.data_ptr(),
            weights.data_ptr(),
            w13.data_ptr(),
            w2.data_ptr(),
            scratch.data_ptr(),
            tokens,
            top_k,
            experts,
            hidden,
            inner,
        )
    return output
