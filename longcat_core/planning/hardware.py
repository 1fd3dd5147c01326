"""GPUs as data: what one has, each number with its kind and its source (data/machines, a file each)."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from longcat_core.planning.figures import Figure, figures_of

DATA = Path(__file__).with_name("data")
MACHINES = DATA / "machines"
MIB = 1 << 20


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
    figures: Mapping[str, Figure] = field(default_factory=dict, repr=False, compare=False)
    """All numbers of its file, with their sources; links and prices are only here."""

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
        ValueError: if it is written otherwise, or the GPU has no file.
    """
    found = re.fullmatch(r"(?:(\d+)\s*[xX*]\s*)?([A-Za-z][\w-]*)", text.strip())
    if found is None or found[1] == "0":
        raise ValueError(f"GPUs: {text!r}, wanted a number and a name, as 8xH200")
    return Machine(int(found[1] or 1), gpu(found[2].upper()))


def gpus() -> tuple[str, ...]:
    """The names of all GPUs that are known, from the slowest product to the fastest."""
    return tuple(sorted(_files(), key=_speed))


def gpu(name: str) -> Gpu:
    """By its short name, as "H100", or as `torch.cuda.get_device_name` has it.

    Raises:
        ValueError: if the GPU has no file.
    """
    files = _files()
    found = next((short for short, data in files.items() if name in (short, *data["device_names"])), None)
    if found is None:
        raise ValueError(f"GPU {name!r}: wanted one of {', '.join(gpus())}; add a file to planning/data/machines")
    data = files[found]
    figures = figures_of(data["figures"])
    assumed = {name: figure.value for name, figure in assumptions().items()}
    return Gpu(
        name=found,
        driver_name=data["device_names"][0],
        architecture_name=data["architecture"],
        architecture=architecture(data["architecture"]),
        multiprocessors=int(figures["multiprocessors"].value),
        memory_mib=int(figures["memory_mib"].value),
        context_mib=int(assumed.pop("context_mib")),
        bytes_per_second=figures["memory_tb_per_s"].value * 1e12,
        operations_per_second={
            "16 bit": figures["bf16_tflops"].value * 1e12,
            "fp8": figures["fp8_tflops"].value * 1e12,
        },
        assumptions=Assumptions(launch_seconds=assumed.pop("launch_us") * 1e-6, **assumed),
        figures=figures,
    )


def architecture(name: str) -> Architecture:
    """By its name, as "sm_90"."""
    figures = figures_of(read(DATA / "architectures.json")[name])
    return Architecture(**{field: int(figure.value) for field, figure in figures.items()})


def assumptions() -> dict[str, Figure]:
    """What of a data sheet's figures is taken to be reached, of all GPUs."""
    return figures_of(read(DATA / "assumptions.json"))


@cache
def read(path: Path) -> Any:
    """A data file; not to be changed."""
    return json.loads(path.read_text())


def _speed(name: str) -> tuple[float, ...]:
    figures = _files()[name]["figures"]
    return tuple(figures[each]["value"] for each in ("bf16_tflops", "memory_mib", "nvlink_gb_per_s"))


@cache
def _files() -> dict[str, Any]:
    return {path.stem: read(path) for path in sorted(MACHINES.glob("*.json"))}
