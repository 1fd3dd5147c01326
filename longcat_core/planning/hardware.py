"""GPUs as data: what one has, each number with its kind and its source (hardware.json)."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).with_name("hardware.json")
MIB = 1 << 20
KINDS = ("spec", "measured", "computed", "assumed")
"""How a number is known: stated by a maker or in a public file, measured, computed from others, or assumed."""


@dataclass(frozen=True)
class Architecture:
    """What a streaming multiprocessor has for the programs (thread blocks) that are on it at once."""

    registers: int
    """Of 32 bits."""
    shared_bytes: int
    shared_bytes_of_a_program: int
    """The most that one program may ask for."""
    reserved_shared_bytes: int
    """That the system takes from shared memory for each program."""
    warps: int
    programs: int


@dataclass(frozen=True)
class Assumptions:
    """What of a data sheet's figures is reached, and what a launch costs."""

    memory_share: float
    product_share: float
    older_instructions_share: float
    """Of what products reach, where the code has `mma.sync` instead of Hopper's own instructions."""
    launch_seconds: float
    """Of a kernel in a CUDA graph, beside its work."""


@dataclass(frozen=True)
class Gpu:
    """One GPU. Rates are the data sheet's, dense."""

    name: str
    """As users say it: H200."""
    driver_name: str
    """As the driver says it, by which engines look for tuned configurations."""
    architecture_name: str
    architecture: Architecture
    multiprocessors: int
    memory_mib: int
    context_mib: int
    """Taken before the first allocation."""
    bytes_per_second: float
    operations_per_second: Mapping[str, float]
    """Multiplications and additions on tensor cores, by the precision of both operands as `kernels.tiles` names it."""
    assumptions: Assumptions

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * MIB

    @property
    def compute_capability(self) -> tuple[int, int]:
        digits = self.architecture_name.removeprefix("sm_")
        return int(digits[:-1]), int(digits[-1])


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind, each connected to each."""

    count: int
    gpu: Gpu

    def __str__(self) -> str:
        return f"{self.count} x {self.gpu.name}"


def machine(text: str) -> Machine:
    """`8xH200`, or `H200` for one.

    Raises:
        ValueError: if it is written otherwise, or the GPU is not in hardware.json.
    """
    found = re.fullmatch(r"(?:(\d+)\s*[xX*]\s*)?([A-Za-z][\w-]*)", text.strip())
    if found is None or found[1] == "0":
        raise ValueError(f"GPUs: {text!r}, wanted a number and a name, as 8xH200")
    return Machine(int(found[1] or 1), gpu(found[2].upper()))


def gpus() -> tuple[str, ...]:
    """The names of all GPUs that are known."""
    return tuple(_data()["gpus"])


def gpu(name: str) -> Gpu:
    """By its short name, as "H100", or as `torch.cuda.get_device_name` has it.

    Raises:
        ValueError: if the GPU is not in hardware.json.
    """
    known = _data()["gpus"]
    found = next((short for short, data in known.items() if name in (short, *data["device_names"])), None)
    if found is None:
        raise ValueError(f"GPU {name!r}: wanted one of {', '.join(known)}; add it to {DATA.name} with its sources")
    data = known[found]
    assumed = _values(_data()["assumptions"])
    return Gpu(
        name=found,
        driver_name=data["device_names"][0],
        architecture_name=data["architecture"],
        architecture=architecture(data["architecture"]),
        multiprocessors=int(data["multiprocessors"]["value"]),
        memory_mib=int(data["memory_mib"]["value"]),
        context_mib=int(assumed.pop("context_mib")),
        bytes_per_second=data["memory_tb_per_s"]["value"] * 1e12,
        operations_per_second={
            "16 bit": data["bf16_tflops"]["value"] * 1e12,
            "fp8": data["fp8_tflops"]["value"] * 1e12,
        },
        assumptions=Assumptions(launch_seconds=assumed.pop("launch_us") * 1e-6, **assumed),
    )


def architecture(name: str) -> Architecture:
    """By its name, as "sm_90"."""
    figures = _values(_data()["architectures"][name])
    return Architecture(**{field: int(value) for field, value in figures.items()})


@cache
def _data() -> Any:
    return json.loads(DATA.read_text())


def _values(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {name: figure["value"] for name, figure in figures.items()}
