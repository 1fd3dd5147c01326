"""How a benchmark's figures are kept: JSON by engine, with the device, the versions and the date; and paired timing."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
ENGINE = "vllm" if find_spec("vllm") else "sglang"
"""The engine of the environment that runs the benchmark."""


def write(name: str, rows: list[dict[str, Any]], **settings: Any) -> Path:
    """Write `results/ENGINE/NAME.json` and return its path."""
    path = path_of(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": name, **environment(), "settings": settings, "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def path_of(name: str) -> Path:
    return RESULTS / ENGINE / f"{name}.json"


def environment() -> dict[str, Any]:
    """Device, versions, date."""
    import torch

    versions = {}
    for package in ("longcat-serving", "torch", "transformers", ENGINE):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    threads = f"{torch.get_num_threads()} threads"
    return {"date": datetime.now(UTC).date().isoformat(), "device": f"{device}, {threads}", "versions": versions}


def paired_times(
    base: Callable[[], object], ours: Callable[[], object], pairs: int, seconds: float
) -> list[tuple[float, float]]:
    """Seconds of a call of each, in runs of about `seconds` that lie side by side, so that a pair sees one machine."""
    base_calls, our_calls = (max(1, round(seconds / _time(function, 1))) for function in (base, ours))
    return [(_time(base, base_calls), _time(ours, our_calls)) for _ in range(pairs)]


def medians(times: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Seconds of the base, seconds of ours, and the ratio base / ours of a pair."""
    return (
        statistics.median(base for base, _ in times),
        statistics.median(ours for _, ours in times),
        statistics.median(base / ours for base, ours in times),
    )


def _time(function: Callable[[], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - started) / calls


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
