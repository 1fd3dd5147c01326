"""RMSNorms on a CPU, where vLLM's are about ten operators of torch each."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import RMSNorm

from longcat_core.kernels.cpu.norm import add_rms_norm, rms_norm, takes


def compile_norms(model: nn.Module) -> None:
    """Have a model's norms computed by core's kernel."""
    for module in model.modules():
        if type(module) is RMSNorm:
            module._forward_method = MethodType(_norm, module)


def _norm(norm: RMSNorm, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """As `RMSNorm.forward`. torch.compile gets vLLM's own, which it fuses with what is around it."""
    if torch.compiler.is_compiling() or not takes(x, norm.weight):
        return norm.forward_native(x, residual)
    if residual is None:
        return rms_norm(x, norm.weight, norm.variance_epsilon)
    return add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)
