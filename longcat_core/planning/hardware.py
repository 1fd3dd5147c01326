"""GPUs as data: what a driver reports of each, from `gpus.json`, with the source of every number."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    name: str
    """As users say it: H200."""
    driver_name: str
    """As the driver says it, by which engines look for tuned configurations."""
    memory_mib: int
    context_mib: int
    """Taken before the first allocation."""
    compute_capability: tuple[int, int]
    multiprocessors: int
    source: str

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.memory_mib * MIB


def _read() -> dict[str, Gpu]:
    rows = json.loads(Path(__file__).with_name("gpus.json").read_text())
    return {
        name: Gpu(name=name, **{**row, "compute_capability": tuple(row["compute_capability"])})
        for name, row in rows.items()
        if name != "_"
    }


GPUS = _read()


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind, each connected to each."""

    count: int
    gpu: Gpu

    def __str__(self) -> str:
        return f"{self.count} x {self.gpu.name}"


def parse(text: str) -> Machine:
    """`8xH200`, or `H200` for one.

    Raises:
        ValueError: if it is written otherwise, or the GPU is not in `gpus.json`.
    """
    found = re.fullmatch(r"(?:(\d+)\s*[xX*]\s*)?([A-Za-z][\w-]*)", text.strip())
    if found is None or found[1] == "0":
        raise ValueError(f"GPUs: {text!r}, wanted a number and a name, as 8xH200")
    if (gpu := GPUS.get(found[2].upper())) is None:
        raise ValueError(f"GPU: {found[2]!r}, wanted one of {', '.join(GPUS)}; another is a row of planning/gpus.json")
    return Machine(int(found[1] or 1), gpu)
