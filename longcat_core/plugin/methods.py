"""Core's kernels in an engine's layers: in the methods that linear layers and the head ask, and in norms."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from longcat_core.kernels.cpu.norm import add_rms_norm, rms_norm, takes


def replace_methods(model: nn.Module, replacements: Mapping[type, type[Any]]) -> None:
    """Make each `quant_method` that is of one of these classes, and of no subclass, one of the other class, which
    derives from it. It keeps its attributes."""
    module: Any
    for module in model.modules():
        replacement = replacements.get(type(getattr(module, "quant_method", None)))
        if replacement is not None:
            attributes = vars(module.quant_method)
            module.quant_method = object.__new__(replacement)
            vars(module.quant_method).update(attributes)


def compile_norms(model: nn.Module, norm: type[Any]) -> None:
    """Have a model's norms computed by core's kernel, where an engine's are about ten operators of torch each.

    norm: the engine's RMSNorm, of which subclasses are left alone. Both engines' call `_forward_method`.
    """
    module: Any
    for module in model.modules():
        if type(module) is norm:
            module._forward_method = MethodType(_norm, module)


def _norm(norm: Any, x: Tensor, residual: Tensor | None = None, *more: Any) -> Tensor | tuple[Tensor, Tensor]:
    """As the engine's `RMSNorm.forward`. torch.compile gets the engine's own, which it fuses with what is around it.

    more: in SGLang, what else is to be added, and what is to be quantised for.
    """
    is_more = any(argument is not None for argument in more)
    if is_more or torch.compiler.is_compiling() or not takes(x, norm.weight):
        return norm.forward_native(x, residual, *more)
    if residual is None:
        return rms_norm(x, norm.weight, norm.variance_epsilon)
    return add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)
