"""Which of an engine's methods multiply: its linear layers and its head ask one, and a model may be given another."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


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
