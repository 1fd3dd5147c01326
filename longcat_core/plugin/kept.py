"""What is made of a module's weights once, and anew after they were loaded again."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def kept(module: Any, make: Callable[[Any], T | None], name: str = "compiled") -> T | None:
    """What `make` returns of the module. It is asked once, until the module's attribute `name` is None again, and kept
    there: False stands for nothing."""
    if getattr(module, name) is None:
        vars(module)[name] = make(module) or False
    return getattr(module, name) or None
