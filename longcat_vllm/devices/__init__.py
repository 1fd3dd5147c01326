"""What LongCat's rooms ask of a device, and the devices that there are: a CPU and NVIDIA's GPUs."""

from __future__ import annotations

from longcat_vllm.devices.base import Device


def current() -> Device:
    """The device that vLLM runs on in this process."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from longcat_vllm.devices.cpu.device import Cpu

        return Cpu()
    from longcat_vllm.devices.cuda.device import Cuda

    return Cuda()
