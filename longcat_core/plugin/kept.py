"""What is made of a module's weights once, and used in its place as long as nobody watches the module."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def kept(module: M, make: Callable[[M], T | None], name: str = "compiled") -> T | None:
    """What `make` returns of the module. It is asked once, until the module's attribute `name` is None again, and kept
    there: False stands for nothing. While somebody has hooks on the module, or on one in it, to see what it is given or
    returns, the answer is None, as then it has to be called."""
    if getattr(module, name) is None:
        made = make(module)
        vars(module)[name] = False if made is None else (made, _hooks_of(module))
    found = getattr(module, name)
    if not found:
        return None
    made, hooks = found
    return None if any(hooks) else made


def _hooks_of(module: nn.Module) -> list[Any]:
    """Of all modules in it, those of each kind: torch adds to these, and takes away."""
    return [hooks for each in module.modules() for hooks in (each._forward_hooks, each._forward_pre_hooks)]
