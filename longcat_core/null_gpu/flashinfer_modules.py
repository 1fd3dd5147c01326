"""FlashInfer on the null GPU: modules that it would compile or download are replaced by some that count their calls."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Iterator
from typing import Any

CALLS: Counter[str] = Counter()
"""By module and function, since the process started. What a call launches is not known, so it counts as one launch."""

ON_THE_HOST = ("init", "get_", "set_", "plan")
"""Functions whose names begin so launch nothing."""
OF_TRTLLM = ("decode", "prefill", "mla._core")
"""Modules that call TensorRT-LLM's attention for Blackwell, of which FlashInfer first downloads the list of files."""
MLA_PLAN = "plan_with_staged_workspace_bytes"
"""The function of which more is read than that it was called: numbers of blocks, then where each field is
(`MLAPlanInfo` in scheduler.cuh, FlashInfer 0.7), and how many bytes were written."""


class NullModule:
    """Has every function, and so has what they return; outputs that the caller has allocated are left as they are."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, function: str) -> NullModule:
        if function.startswith("__"):
            raise AttributeError(function)
        return NullModule(f"{self._name}.{function}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, _, function = self._name.rpartition(".")
        if function == MLA_PLAN:
            return [1, 1, *range(0, 16 * 4096, 4096)], 0
        if not function.startswith(ON_THE_HOST):
            CALLS[self._name] += 1
        return NullModule(module if function == "init" else self._name)

    def __int__(self) -> int:
        """As the number of something that there must be one of, or as the size of a workspace."""
        return 0 if "workspace" in self._name else 1

    __index__ = __int__

    def __gt__(self, other: int) -> bool:
        return int(self) > other

    def __lt__(self, other: int) -> bool:
        return int(self) < other

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __bool__(self) -> bool:
        return True


def install() -> None:
    """Nothing, where FlashInfer is not installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return
    core = importlib.import_module("flashinfer.jit.core")
    core.JitSpec.build_and_load = lambda spec: NullModule(f"flashinfer {spec.name}")
    for name in OF_TRTLLM:
        user: Any = importlib.import_module(f"flashinfer.{name}")
        assert hasattr(user, "get_trtllm_gen_fmha_module"), name
        user.get_trtllm_gen_fmha_module = lambda: NullModule("flashinfer fmha_gen")
