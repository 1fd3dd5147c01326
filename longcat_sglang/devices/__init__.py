"""What LongCat's rooms ask of a device, and the devices that there are: a CPU and NVIDIA's GPUs."""

from __future__ import annotations

from longcat_sglang.devices.base import Device


def of(name: str) -> Device:
    """The device of SGLang's `--device`."""
    if name == "cpu":
        from longcat_sglang.devices.cpu.device import Cpu

        return Cpu()
    from longcat_sglang.devices.cuda.device import Cuda

    return Cuda()


def current() -> Device:
    """The device that SGLang runs on in this process."""
    from sglang.srt.utils import is_cpu

    return of("cpu" if is_cpu() else "cuda")
