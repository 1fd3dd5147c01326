"""Rates of a CPU: what `longcat plan --calibrate` measured of it, and what engines take beside it (data/cpu.json)."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from longcat_core.planning.figures import Figure, figures_of
from longcat_core.planning.hardware import DATA, read
from longcat_core.planning.rates import Rates

ENGINES = DATA / "cpu.json"
"""The mean of a run of each engine. Two runs differ by up to three times: docs/plan.md."""


def calibrated(path: Path) -> tuple[str, Rates]:
    """The name and the rates of a machine that `longcat plan --calibrate` has measured.

    Raises:
        ValueError: if the file is not such a one.
    """
    raw = json.loads(path.read_text())
    if not isinstance(raw, dict) or not {"name", "figures"} <= raw.keys():
        raise ValueError(f"{path}: not a file of longcat plan --calibrate")
    try:
        return raw["name"], rates_of(raw["name"], figures_of(raw["figures"]))
    except KeyError as error:
        raise ValueError(f"{path}: no figure {error}; measure again with longcat plan --calibrate") from None


def rates_of(name: str, figures: Mapping[str, Figure]) -> Rates:
    """figures: of a calibration.

    Raises:
        KeyError: with the name of one that is missing.
    """
    engines = figures_of(read(ENGINES))
    # Python and the operating system are as much slower here, or quicker, as a small operator is.
    slower = figures["operator_overhead_us"].value / engines["operator_overhead_us"].value

    def seconds(which: str) -> float:
        return engines[which].value * slower * 1e-6

    products = _points(figures, "product_bf16_", "_rows_gflops")
    rates = Rates(
        name="calibrated",
        about=f"measured on {name}",
        memory_bytes_per_second=figures["memory_gb_per_s"].value * 1e9,
        # A CPU has no product in FP8: a weight is read in FP8, and multiplied in bf16 or fp32.
        products_per_second={"bf16": products, "fp8": products},
        attention_per_second=0.0,
        fp8_cache_speedup=1.0,
        inside_bytes_per_second=figures["memory_gb_per_s"].value * 1e9,
        outside_bytes_per_second=figures["memory_gb_per_s"].value * 1e9,
        gpus_inside=1,
        overlap_share=0.0,
        layer_seconds=seconds("cold_layer_us"),
        has_latency=False,
        has_imbalance=False,
        reads_every_expert=False,
        splits_batches=True,
        omitted=frozenset(),
        figures=(*figures.values(), *(each for each in engines.values() if each.name not in figures)),
        memory_bytes=figures["memory_gb"].value * 1e9,
        attention_by_context=_points(figures, "attention_", "_tokens_gflops"),
        few_rows=figures["few_rows"].value,
        many_rows_layer_seconds=seconds("cold_many_rows_layer_us"),
        layer_request_seconds=seconds("layer_request_us"),
        step_seconds=seconds("cold_step_us"),
        request_seconds=seconds("request_us"),
        cache_bytes=figures["cache_mb"].value * 1e6,
    )
    cached = _points(figures, "cached_product_bf16_", "_rows_gflops")
    in_cache = replace(
        rates,
        memory_bytes_per_second=figures["cache_gb_per_s"].value * 1e9,
        products_per_second={"bf16": cached, "fp8": cached},
        layer_seconds=seconds("layer_us"),
        many_rows_layer_seconds=seconds("many_rows_layer_us"),
        step_seconds=seconds("step_us"),
    )
    return replace(rates, in_cache=in_cache)


def _points(figures: Mapping[str, Figure], before: str, after: str) -> tuple[tuple[float, float], ...]:
    """What is between these two parts of a name, and operations a second.

    Raises:
        KeyError: if there is none.
    """
    found = {name: figure for name, figure in figures.items() if name.startswith(before)}
    if not found:
        raise KeyError(f"{before}N{after}")
    numbers = ((float(name.removeprefix(before).removesuffix(after)), each.value * 1e9) for name, each in found.items())
    return tuple(sorted(numbers))
