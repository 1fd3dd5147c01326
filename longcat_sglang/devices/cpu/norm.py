"""RMSNorms on a CPU, where SGLang's are about ten operators of torch each."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from types import MethodType
from typing import Any

from sglang.srt.layers.layernorm import RMSNorm
from torch import Tensor, nn

from longcat_core.kernels.cpu.norm import add_rms_norm, rms_norm, takes


def compile_norms(model: nn.Module) -> None:
    """Have a model's norms computed by core's kernel."""
    for module in model.modules():
        if type(module) is RMSNorm:
            module._forward_method = MethodType(_norm, module)


def _norm(norm: RMSNorm, x: Tensor, residual: Tensor | None = None, *more: Any) -> Tensor | tuple[Tensor, Tensor]:
    """As `RMSNorm.forward`. more: what else is to be added, and what is to be quantised for."""
    if any(argument is not None for argument in more) or not takes(x, norm.weight):
        return norm.forward_native(x, residual, *more)
    if residual is None:
        return rms_norm(x, norm.weight, norm.variance_epsilon)
    return add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)
