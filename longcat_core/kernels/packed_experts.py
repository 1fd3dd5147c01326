"""FFN experts on a CPU through oneDNN, with weights packed for it once. Reference: `experts.grouped_ffn`.

For an engine without a kernel of its own, as SGLang without `sgl_kernel`: with few rows an expert, oneDNN reads weights
in its own layout about twice as fast as `F.linear` reads plain ones.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from longcat_core.layers.experts import ffn_by_expert


def is_supported(dtype: torch.dtype) -> bool:
    """Whether this torch and this CPU have oneDNN's packed product in `dtype`."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


class PackedExperts:
    """SwiGLU experts over packed copies of their weights: an `ExpertFFN`, for inference only, without gradients.

    w13: [E, 2 I, H], gate above up; w2: [E, H, I]. The arguments are not kept, so the caller may free them.
    """

    def __init__(self, w13: Tensor, w2: Tensor) -> None:
        pack = torch.ops.mkldnn._reorder_linear_weight
        self._packed = [(pack(gate_up, None), pack(down, None)) for gate_up, down in zip(w13, w2, strict=True)]
        linear = torch.ops.mkldnn._linear_pointwise.default
        self._ffn = ffn_by_expert(
            len(self._packed),
            gate_up=lambda expert, rows: linear(rows, self._packed[expert][0], None, "none", [], ""),
            down=lambda expert, rows: linear(rows, self._packed[expert][1], None, "none", [], ""),
        )

    def __call__(self, rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        return self._ffn(rows, experts, weights)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """w13 and w2 as they were, bit for bit."""
        w13, w2 = zip(*self._packed, strict=True)
        return torch.stack([weight.to_dense() for weight in w13]), torch.stack([weight.to_dense() for weight in w2])
