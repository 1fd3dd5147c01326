"""Kernels that SGLang compiles when they are needed: on the null GPU their calls are counted."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang.kernels.jit.utils.compile import loader

from longcat_core.null_gpu.flashinfer_modules import NullModule


def install() -> None:
    """Every module is taken to be built already, and to be one that does nothing."""
    loader._find_prebuilt = _found
    loader._load = _loaded  # type: ignore[assignment]


def _found(*, spec: Any, scope: Path) -> Path:
    return Path(spec.module_name)


def _loaded(library: Path) -> NullModule:
    return NullModule(f"sglang {library.name}")
