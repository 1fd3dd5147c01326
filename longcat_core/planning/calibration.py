"""Measures the CPU at hand for a plan: memory bandwidth, products at some numbers of rows, what an operator costs."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from longcat_core.planning.figures import Figure

MOST_LOAD = 0.5
"""Processes that wait or run, on average over a minute: above it other work would be measured too."""


class CalibrationError(ValueError):
    """This machine cannot be measured now; the message says why."""


@dataclass(frozen=True)
class Sizes:
    """Of what is measured: six things, in less than a minute together."""

    bytes_read: int = 1 << 29
    weights: tuple[int, int, int] = (16, 2048, 4096)
    """Matrices of so many rows and columns in bf16, together beyond any cache: each is used once in turn."""
    rows: tuple[int, ...] = (1, 8, 64, 512)
    operators: int = 2000
    passes: int = 80
    """Of each, fewer if they take longer than `seconds` together; at least one."""
    seconds: float = 6.0


SIZES = Sizes()


def calibrate(sizes: Sizes = SIZES, load: Callable[[], Sequence[float]] = os.getloadavg) -> Mapping[str, object]:
    """The data of a file that `rates.calibrated` reads: name and figures.

    load: as os.getloadavg.

    Raises:
        CalibrationError: if the machine is busy.
    """
    busy = load()[0]
    if busy > MOST_LOAD:
        raise CalibrationError(
            f"load average {busy:.2f}, wanted at most {MOST_LOAD}: other processes would be measured too"
        )
    how = f"longcat plan --calibrate, torch {torch.__version__}, {torch.get_num_threads()} threads"
    with torch.inference_mode():
        found = [_figure("memory_gb_per_s", _bandwidth(sizes) / 1e9, "GB/s read", how)]
        for rows, rate in _products(sizes).items():
            found.append(_figure(f"product_bf16_{rows}_rows_gflops", rate / 1e9, "GFLOPS", how))
        found.append(_figure("operator_overhead_us", _operator_seconds(sizes) * 1e6, "us an operator", how))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    found.append(_figure("memory_gb", memory, "GB", how))
    return {"name": _processor(), "figures": {each.name: _raw(each) for each in found}}


def write(calibration: Mapping[str, object], path: Path) -> None:
    path.write_text(json.dumps(calibration, indent=1) + "\n")


def _bandwidth(sizes: Sizes) -> float:
    """Bytes a second of reading a tensor once."""
    data = torch.ones(sizes.bytes_read // 4, dtype=torch.float32)
    return data.nbytes / _median(data.sum, sizes)


def _products(sizes: Sizes) -> dict[int, float]:
    """Operations a second by rows, with weights that come from memory."""
    count, columns, depth = sizes.weights
    first = torch.randn(columns, depth).to(torch.bfloat16)
    weights = itertools.cycle([first, *(first.clone() for _ in range(count - 1))])
    found = {}
    for rows in sizes.rows:
        inputs = torch.randn(rows, depth).to(torch.bfloat16)

        def once(inputs: torch.Tensor = inputs) -> None:
            F.linear(inputs, next(weights))

        found[rows] = 2 * rows * columns * depth / _median(once, sizes)
    return found


def _operator_seconds(sizes: Sizes) -> float:
    """Of an operator on almost nothing."""
    little = torch.ones(8)

    def once() -> None:
        for _ in range(sizes.operators):
            torch.add(little, little)

    return _median(once, sizes) / sizes.operators


def _median(action: Callable[[], object], sizes: Sizes) -> float:
    """Seconds; the first pass, which allocates, is not counted."""
    action()
    times: list[float] = []
    while not times or (len(times) < sizes.passes and sum(times) < sizes.seconds):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _figure(name: str, value: float, unit: str, how: str) -> Figure:
    return Figure(name, value, unit, "measured", how, datetime.date.today())


def _raw(figure: Figure) -> dict[str, object]:
    return {
        "value": figure.value,
        "unit": figure.unit,
        "kind": figure.kind,
        "source": figure.source,
        "date": figure.date.isoformat(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()
