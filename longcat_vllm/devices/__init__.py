"""The devices, a CPU and NVIDIA's GPUs, and which of them vLLM runs on."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from longcat_core.plugin.diagnosis import Finding
from longcat_vllm.devices.base import Device


def current() -> Device:
    """The device that vLLM runs on in this process."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from longcat_vllm.devices.cpu.device import Cpu

        return Cpu()
    if current_platform.is_cuda():  # not ROCm, where vLLM has other kernels of experts
        from longcat_vllm.devices.cuda.device import Cuda

        return Cuda()
    from longcat_vllm.devices.unknown import Unknown

    return Unknown(current_platform.device_name)


def found() -> Finding:
    """The platform that vLLM has found."""
    from vllm.platforms import current_platform

    return Finding("platform", f"{type(current_platform).__module__}.{type(current_platform).__qualname__}")
