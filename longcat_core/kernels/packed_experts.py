"""FFN experts on a CPU through oneDNN, whose weights are laid out for it once. Reference: `experts.grouped_ffn`.

Where an engine has no kernel of its own, as SGLang without `sgl_kernel`: on few rows an expert, oneDNN reads weights
in its own layout about twice as fast as `F.linear` reads them as they are stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_core.experts import ExpertFFN, ffn_by_expert


def is_supported(dtype: torch.dtype) -> bool:
    """Whether this torch and this CPU have oneDNN's packed product in `dtype`."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def packed_ffn(w13: Tensor, w2: Tensor) -> ExpertFFN:
    """SwiGLU experts over packed copies of w13 [E, 2 I, H], gate above up, and w2 [E, H, I].

    Nothing of the arguments is kept, so the caller may free them. For inference: there is no gradient.
    """
    pack, linear = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    packed = [(pack(gate_up, None), pack(down, None)) for gate_up, down in zip(w13, w2, strict=True)]

    def apply(expert: int, rows: Tensor) -> Tensor:
        gate_up, down = packed[expert]
        gate, up = linear(rows, gate_up, None, "none", [], "").chunk(2, dim=-1)
        return linear(F.silu(gate) * up, down, None, "none", [], "")

    return ffn_by_expert(len(packed), apply)
