"""Measures the CPU at hand for a plan: bandwidth, products by rows, attention by context, what an operator costs.

Products and attention are this package's kernels where these are built and serve, else torch's.
"""
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

from longcat_core.kernels.cpu.attention import paged_attention
from longcat_core.kernels.cpu.library import description, is_available
from longcat_core.kernels.cpu.product import FEW_ROWS, is_quicker_than_torch, product
from longcat_core.layers.latent_attention import PagedBatch, UpProjection
from longcat_core.planning.figures import Figure

MOST_LOAD = 0.5
"""Processes that wait or run, on average over a minute: above it other work would be measured too."""


class CalibrationError(ValueError):
    """This machine cannot be measured now; the message says why."""


@dataclass(frozen=True)
class Sizes:
    """Of what is measured: a dozen things, in less than a minute together."""

    bytes_read: int = 1 << 29
    cached_bytes_read: int = 1 << 23
    weights: tuple[int, int, int] = (16, 2048, 4096)
    """Matrices of so many rows and columns in bf16, together beyond any cache: each is used once in turn."""
    cached_weights: tuple[int, int, int] = (4, 1024, 1024)
    """The same within a cache."""
    rows: tuple[int, ...] = (1, 8, 64, 512)
    heads: int = 16
    head_dims: tuple[int, int, int, int] = (128, 64, 512, 128)
    """Of attention: a head's part without and with rotary embedding, the latent, a head's values."""
    requests: int = 8
    contexts: tuple[int, ...] = (128, 1024)
    """Of attention, in tokens that a request has in the cache."""
    operators: int = 2000
    passes: int = 80
    """Of each, fewer if they take longer than `seconds` together; at least one."""
    seconds: float = 3.0


SIZES = Sizes()


def calibrate(sizes: Sizes = SIZES, load: Callable[[], Sequence[float]] = os.getloadavg) -> Mapping[str, object]:
    """The data of a file that `cpu.calibrated` reads: name and figures.

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
    kernels = f"{how}, kernels: {description()}"
    with torch.inference_mode():
        operator = _operator_seconds(sizes)
        found = [_figure("memory_gb_per_s", _bandwidth(sizes.bytes_read, sizes) / 1e9, "GB/s read", how)]
        for rows, rate in _products(sizes.weights, sizes).items():
            found.append(_figure(f"product_bf16_{rows}_rows_gflops", rate / 1e9, "GFLOPS", kernels))
        found.append(_figure("cache_gb_per_s", _bandwidth(sizes.cached_bytes_read, sizes) / 1e9, "GB/s read", how))
        cached = _products(sizes.cached_weights, sizes)
        for rows, rate in cached.items():
            found.append(_figure(f"cached_product_bf16_{rows}_rows_gflops", rate / 1e9, "GFLOPS", kernels))
        for context in sizes.contexts:
            rate = _attention(context, cached, sizes)
            found.append(_figure(f"attention_{context}_tokens_gflops", rate / 1e9, "GFLOPS", kernels))
        operator = min(operator, _operator_seconds(sizes))  # what interrupts only adds to it
        found.append(_figure("operator_overhead_us", operator * 1e6, "us an operator", how))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    found.append(_figure("memory_gb", memory, "GB", how))
    found.append(_figure("cache_mb", _cache_bytes() / 1e6, "MB, third level", "Linux", "spec"))
    few_rows = FEW_ROWS if is_available() else 0
    found.append(_figure("few_rows", few_rows, "tokens, whose layers are compiled", description(), "spec"))
    return {"name": _processor(), "figures": {each.name: _raw(each) for each in found}}


def write(calibration: Mapping[str, object], path: Path) -> None:
    path.write_text(json.dumps(calibration, indent=1) + "\n")


def _bandwidth(count: int, sizes: Sizes) -> float:
    """Bytes a second of reading a tensor of so many, again and again."""
    data = torch.ones(count // 4, dtype=torch.float32)
    return data.nbytes / _median(data.sum, sizes)


def _products(weights_of: tuple[int, int, int], sizes: Sizes) -> dict[int, float]:
    """Operations a second by rows, with weights that are used in turn."""
    count, columns, depth = weights_of
    first = torch.randn(columns, depth).to(torch.bfloat16)
    weights = itertools.cycle([first, *(first.clone() for _ in range(count - 1))])
    found = {}
    for rows in sizes.rows:
        inputs = torch.randn(rows, depth).to(torch.bfloat16)

        multiply = product if is_quicker_than_torch(torch.bfloat16, rows) else F.linear

        def once(inputs: torch.Tensor = inputs, multiply: Callable[..., torch.Tensor] = multiply) -> None:
            multiply(inputs, next(weights))

        found[rows] = 2 * rows * columns * depth / _median(once, sizes)
    return found


def _attention(context: int, products: Mapping[int, float], sizes: Sizes) -> float:
    """Operations a second of MLA's core for a decode step: what is left of attention beside the products into latent
    space and out of it, at the rate of others of as many rows with weights in a cache."""
    heads, requests, (nope, rope, latent, value) = sizes.heads, sizes.requests, sizes.head_dims
    up = UpProjection.of(torch.randn(heads * (nope + value), latent).to(torch.bfloat16), heads, nope)
    slots = torch.randperm(requests * context).view(requests, context)
    batch = PagedBatch(range(requests + 1), [context] * requests, slots, block_size=1)
    cache = torch.randn(requests * context, latent + rope).to(torch.bfloat16)
    queries = torch.randn(requests, heads, nope + rope).to(torch.bfloat16)
    seconds = _median(lambda: paged_attention(queries, cache, batch, up, (nope + rope) ** -0.5), sizes)
    rows = min(products, key=lambda rows: abs(rows - requests))
    beside = 2 * requests * heads * latent * (nope + value) / products[rows]
    core = 2 * requests * context * heads * (2 * latent + rope)
    return core / max(seconds - beside, seconds / 4)  # at tiny sizes the difference is noise


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


def _figure(name: str, value: float, unit: str, how: str, kind: str = "measured") -> Figure:
    return Figure(name, value, unit, kind, how, datetime.date.today())


def _raw(figure: Figure) -> dict[str, object]:
    return {
        "value": figure.value,
        "unit": figure.unit,
        "kind": figure.kind,
        "source": figure.source,
        "date": figure.date.isoformat(),
    }


def _cache_bytes() -> int:
    """0 where Linux does not say it."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    except OSError:
        return 0
    return int(size.removesuffix("K")) * 1024 if size.endswith("K") else 0


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()
