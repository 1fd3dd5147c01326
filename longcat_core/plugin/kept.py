"""What is made of a module's weights once, and used in its place as long as nobody watches the module."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules import module as torch_modules

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def kept(module: M, make: Callable[[M], T | None], name: str = "compiled") -> T | None:
    """What `make` returns of the module. It is asked once, until the module's attribute `name` is None again, and kept
    there: False stands for nothing. While somebody has hooks on the module, or on one in it, to see what it is given or
    returns, the answer is None, as then it has to be called."""
    if getattr(module, name) is None:
        hooks = _hooks_of(module)
        if any(hooks):  # also of those that `make` asks the same of
            return None
        made = make(module)
        vars(module)[name] = False if made is None else (made, hooks)
    found = getattr(module, name)
    if not found:
        return None
    made, hooks = found
    return None if any(hooks) else made


def _hooks_of(module: nn.Module) -> list[Any]:
    """Of all modules in it, and of all modules that there are: torch adds to these, and takes away."""
    of_all = [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]
    return of_all + [hooks for each in module.modules() for hooks in (each._forward_hooks, each._forward_pre_hooks)]
