"""GPUs as data: what one has, each number with its kind and its source (hardware.json)."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).with_name("hardware.json")
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
    architecture_name: str
    architecture: Architecture
    multiprocessors: int
    bytes_per_second: float
    operations_per_second: Mapping[str, float]
    """Multiplications and additions on tensor cores, by the precision of both operands as `kernels.tiles` names it."""
    assumptions: Assumptions


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
        architecture_name=data["architecture"],
        architecture=architecture(data["architecture"]),
        multiprocessors=int(data["multiprocessors"]["value"]),
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
