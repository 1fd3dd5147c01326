"""FFN experts on a CPU through oneDNN, whose weights are laid out for it once. Reference: `experts.grouped_ffn`.

Where an engine has no kernel of its own, as SGLang without `sgl_kernel`: on few rows an expert, oneDNN reads weights
in its own layout about twice as fast as `F.linear` reads them as they are stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_core.experts import ffn_by_expert


def is_supported(dtype: torch.dtype) -> bool:
    """Whether this torch and this CPU have oneDNN's packed product in `dtype`."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


class PackedExperts:
    """SwiGLU experts over packed copies of their weights: an `ExpertFFN`, for inference, as there is no gradient.

    w13: [E, 2 I, H], gate above up; w2: [E, H, I]. Nothing of the arguments is kept, so the caller may free them.
    """

    def __init__(self, w13: Tensor, w2: Tensor) -> None:
        pack = torch.ops.mkldnn._reorder_linear_weight
        self._packed = [(pack(gate_up, None), pack(down, None)) for gate_up, down in zip(w13, w2, strict=True)]
        self._ffn = ffn_by_expert(len(self._packed), self._apply)

    def __call__(self, rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        return self._ffn(rows, experts, weights)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """w13 and w2 as they were, bit for bit."""
        w13, w2 = zip(*self._packed, strict=True)
        return torch.stack([weight.to_dense() for weight in w13]), torch.stack([weight.to_dense() for weight in w2])

    def _apply(self, expert: int, rows: Tensor) -> Tensor:
        linear = torch.ops.mkldnn._linear_pointwise
        gate_up, down = self._packed[expert]
        gate, up = linear(rows, gate_up, None, "none", [], "").chunk(2, dim=-1)
        return linear(F.silu(gate) * up, down, None, "none", [], "")
