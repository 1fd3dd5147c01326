"""The devices, a CPU and NVIDIA's GPUs, and which of them SGLang runs on."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os

from longcat_core.plugin.diagnosis import Finding
from longcat_sglang.devices.base import Device


def of(name: str) -> Device:
    """The device of SGLang's `--device`."""
    if name == "cpu":
        from longcat_sglang.devices.cpu.device import Cpu

        return Cpu()
    from sglang.srt.utils import is_hip

    if name == "cuda":
        if not is_hip():
            from longcat_sglang.devices.cuda.device import Cuda

            return Cuda()
        name = "rocm"  # which SGLang, as PyTorch, calls cuda
    from longcat_sglang.devices.unknown import Unknown

    return Unknown(name)


def current() -> Device:
    """The device that SGLang runs on in this process."""
    from sglang.srt.utils import get_device, is_cpu

    return of("cpu" if is_cpu() else get_device().partition(":")[0])


def found() -> Finding:
    """The platform that SGLang has found, and what is wrong if it is not a CPU or CUDA."""
    from sglang.srt.platforms import current_platform

    name = f"{type(current_platform).__module__}.{type(current_platform).__qualname__}"
    selected = os.environ.get("SGLANG_PLATFORM")
    if current_platform.is_cpu() or current_platform.is_cuda() or not selected:
        return Finding("platform", name)
    problem = f"with SGLANG_PLATFORM={selected!r} SGLang loads no plugin of longcat-serving; unset it"
    return Finding("platform", name, problem)
