"""The calibration of a CPU, at tiny sizes: what it writes, what is read back, and when it is refused."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longcat_core.kernels.cpu.library import is_available
from longcat_core.kernels.cpu.product import FEW_ROWS
from longcat_core.planning.calibration import SIZES, CalibrationError, Sizes, _median, calibrate, write
from longcat_core.planning.cpu import calibrated, rates_of
from longcat_core.planning.figures import figures_of
from longcat_core.planning.layout import Layout, precision
from longcat_core.planning.memory import weights
from longcat_core.planning.models import model
from longcat_core.planning.plan import Deployment
from longcat_core.planning.step import StepTime
from longcat_nano import CHECKPOINT

TINY = Sizes(
    bytes_read=1 << 16,
    cached_bytes_read=1 << 12,
    weights=(2, 16, 32),
    cached_weights=(1, 16, 32),
    rows=(1, 4),
    heads=2,
    head_dims=(16, 16, 32, 16),
    requests=2,
    contexts=(4, 8),
    operators=5,
    passes=2,
)


def idle() -> tuple[float, float, float]:
    return 0.0, 9.0, 9.0


def test_what_is_measured_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "cpu.json"
    found = calibrate(TINY, idle)
    write(found, file)
    figures = figures_of(found["figures"])  # type: ignore[arg-type]
    products = ["product_bf16_1_rows_gflops", "product_bf16_4_rows_gflops"]
    names = ["memory_gb_per_s", *products, "cache_gb_per_s", *(f"cached_{name}" for name in products)]
    names += ["attention_4_tokens_gflops", "attention_8_tokens_gflops", "operator_overhead_us"]
    assert list(figures) == [*names, "memory_gb", "cache_mb", "few_rows"]
    assert {name for name, figure in figures.items() if figure.kind == "measured"} == {*names, "memory_gb"}
    assert all(figures[name].value > 0 and torch.__version__ in figures[name].source for name in names)
    name, rates = calibrated(file)
    assert name
    assert rates.memory_bytes_per_second == figures["memory_gb_per_s"].value * 1e9
    assert rates.products("bf16", 4) == figures["product_bf16_4_rows_gflops"].value * 1e9
    assert rates.in_cache is not None
    assert rates.in_cache.products("bf16", 4) == figures["cached_product_bf16_4_rows_gflops"].value * 1e9
    assert rates.in_cache.memory_bytes_per_second == figures["cache_gb_per_s"].value * 1e9
    assert rates.attention(8) == rates.in_cache.attention(9) == figures["attention_8_tokens_gflops"].value * 1e9
    assert rates.memory_bytes > 1e9
    assert rates.cache_bytes == figures["cache_mb"].value * 1e6


def test_fixed_costs_are_as_much_longer_as_an_operator_is(tmp_path: Path) -> None:
    figures = figures_of(calibrate(TINY, idle)["figures"])  # type: ignore[arg-type]
    operator = figures["operator_overhead_us"]
    one, two = (
        rates_of("", figures | {operator.name: replace(operator, value=times * operator.value)}) for times in (1, 2)
    )
    for name in (
        "layer_seconds",
        "many_rows_layer_seconds",
        "layer_request_seconds",
        "step_seconds",
        "request_seconds",
    ):
        assert getattr(two, name) == pytest.approx(2 * getattr(one, name))
        assert getattr(one, name) > 0


def test_layers_are_compiled_for_as_many_rows_as_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rates_of("", figures_of(calibrate(TINY, idle)["figures"])).few_rows == FEW_ROWS * is_available()  # type: ignore[arg-type]
    monkeypatch.setattr("longcat_core.planning.calibration.is_available", lambda: False)
    assert rates_of("", figures_of(calibrate(TINY, idle)["figures"])).few_rows == 0  # type: ignore[arg-type]


def test_a_small_model_is_planned_with_the_rates_of_a_cache(tmp_path: Path) -> None:
    """Which 1 MB more of a cache decides."""
    figures = figures_of(calibrate(TINY, idle)["figures"])  # type: ignore[arg-type]
    known = model(str(CHECKPOINT))
    held = weights(known, Layout(), precision("bf16")).total + 3 * 100 * known.cache_bytes_a_token()

    def step(cache_mb: float) -> StepTime:
        cached = figures | {"cache_mb": replace(figures["cache_mb"], value=cache_mb)}
        rates = replace(rates_of("", cached), step_seconds=7.0)
        return Deployment(known, "", rates, Layout(), precision("bf16"), context=100).step(3)

    assert step(held / 1e6 - 1).engine_seconds > 7
    assert step(held / 1e6 + 1).engine_seconds < 1


def test_it_measures_the_rows_that_a_decode_step_has() -> None:
    assert SIZES.rows == (1, 8, 64, 512)
    count, columns, depth = SIZES.weights
    assert count * columns * depth * 2 >= 1 << 28, "more than any cache holds"


def test_a_slow_machine_is_measured_in_fewer_passes() -> None:
    """At most 3 seconds of each of 14 things, and a pass more, after one to warm up."""
    measured = 2 + 2 * len(SIZES.rows) + len(SIZES.contexts) + 2
    assert measured == 14
    assert SIZES.seconds * measured < 45
    passes = []
    _median(lambda: passes.append(time.sleep(0.02)), replace(TINY, passes=100, seconds=0.05))
    assert 2 <= len(passes) <= 5
    passes.clear()
    _median(lambda: passes.append(None), replace(TINY, passes=3))
    assert len(passes) == 4


def test_a_busy_machine_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"load average 0\.51, wanted at most 0\.5"):
        calibrate(TINY, lambda: (0.51, 0.0, 0.0))


def test_another_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cpu.json"
    file.write_text("[]")
    with pytest.raises(ValueError, match="not a file of longcat plan --calibrate"):
        calibrated(file)
    known = dict(calibrate(TINY, idle))
    known["figures"] = {name: each for name, each in known["figures"].items() if not name.startswith("attention")}  # type: ignore[attr-defined]
    write(known, file)
    with pytest.raises(ValueError, match="no figure 'attention_N_tokens_gflops'; measure again"):
        calibrated(file)


def test_a_plan_of_a_cpu_is_bound_by_what_was_measured(tmp_path: Path) -> None:
    """A step at batch 1 reads each weight that is used once, and pays for its operators."""
    file = tmp_path / "cpu.json"
    write(calibrate(TINY, idle), file)
    name, rates = calibrated(file)
    plan = Deployment(model("lite"), name, rates, Layout(), precision("bf16"), context=1).at(1)
    read = model("lite").activated_parameters(8) * 2
    assert plan.step.seconds > read / rates.memory_bytes_per_second
    assert plan.step.overhead_seconds == rates.layer_seconds + rates.layer_request_seconds
    assert plan.step.engine_seconds == rates.step_seconds + rates.request_seconds
    assert plan.step.seconds > 14 * plan.step.overhead_seconds + plan.step.engine_seconds
