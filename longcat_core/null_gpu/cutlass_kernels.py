"""CUTLASS's kernels in Python (CuTe DSL) on the null GPU: those that would be compiled count their calls instead."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from longcat_core.null_gpu.flashinfer_modules import NullModule


def install() -> None:
    """Nothing, where CUTLASS's DSL is not installed. Its own runtime asks the driver for what the null GPU has not."""
    if importlib.util.find_spec("cutlass") is None:
        return
    cute: Any = importlib.import_module("cutlass.cute")
    cute.compile = _compile


def _compile(kernel: Any, *arguments: Any, **options: Any) -> NullModule:
    """kernel: a function, or an object that is called as one."""
    return NullModule(f"cutlass {getattr(kernel, '__name__', type(kernel).__name__)}")
