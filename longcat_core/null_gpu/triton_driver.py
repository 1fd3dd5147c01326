"""Triton on the null GPU: calls of kernels are checked against their parameters and counted, not compiled."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver

LAUNCHES: Counter[str] = Counter()
"""By kernel, since the process started."""


class NullDriver(GPUDriver):  # type: ignore[misc]  # Triton has no types
    """Everything takes a millisecond, so that an autotuner takes its first configuration."""

    utils = None

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        major, minor = torch.cuda.get_device_capability()
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return lambda call, *, quantiles=None, **options: [1.0] * len(quantiles or [1])

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1, device="cuda")

    def clear_cache(self, cache: torch.Tensor) -> None:
        pass


def _run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    """In place of `JITFunction.run`."""
    *_, binder = kernel.device_caches[torch.cuda.current_device()]
    binder(*args, **{**kwargs, "debug": False, "instrumentation_mode": ""})
    if not warmup:
        LAUNCHES[kernel.__name__] += 1
    return SimpleNamespace(n_regs=32, n_spills=0, n_max_threads=1024, metadata=SimpleNamespace(shared=0, num_warps=4))


def install() -> None:
    triton.runtime.driver.set_active(NullDriver())
    backends = triton.backends.backends  # of which Inductor makes the driver active
    backends["nvidia"] = replace(backends["nvidia"], driver=NullDriver)
    triton.runtime.jit.JITFunction.run = _run
