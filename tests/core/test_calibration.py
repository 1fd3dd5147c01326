"""The calibration of a CPU, at tiny sizes: what it writes, what is read back, and when it is refused."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longcat_core.planning.calibration import SIZES, CalibrationError, Sizes, _median, calibrate, write
from longcat_core.planning.figures import figures_of
from longcat_core.planning.layout import Layout, precision
from longcat_core.planning.models import model
from longcat_core.planning.plan import Deployment
from longcat_core.planning.rates import calibrated

TINY = Sizes(bytes_read=1 << 16, weights=(2, 16, 32), rows=(1, 4), operators=5, passes=2)


def idle() -> tuple[float, float, float]:
    return 0.0, 9.0, 9.0


def test_what_is_measured_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "cpu.json"
    found = calibrate(TINY, idle)
    write(found, file)
    figures = figures_of(found["figures"])  # type: ignore[arg-type]
    names = ["memory_gb_per_s", "product_bf16_1_rows_gflops", "product_bf16_4_rows_gflops"]
    assert list(figures) == [*names, "operator_overhead_us", "memory_gb"]
    assert {figure.kind for figure in figures.values()} == {"measured"}
    assert all(figure.value > 0 and torch.__version__ in figure.source for figure in figures.values())
    name, rates = calibrated(file)
    assert name
    assert rates.memory_bytes_per_second == figures["memory_gb_per_s"].value * 1e9
    assert rates.products("bf16", 4) == figures["product_bf16_4_rows_gflops"].value * 1e9
    assert rates.layer_seconds == pytest.approx(48 * figures["operator_overhead_us"].value * 1e-6)
    assert rates.memory_bytes > 1e9


def test_it_measures_the_rows_that_a_decode_step_has() -> None:
    assert SIZES.rows == (1, 8, 64, 512)
    count, columns, depth = SIZES.weights
    assert count * columns * depth * 2 >= 1 << 28, "more than any cache holds"


def test_a_slow_machine_is_measured_in_fewer_passes() -> None:
    """At most 6 seconds of each of 6 things, and a pass more, after one to warm up."""
    assert SIZES.seconds * 6 < 40
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


def test_a_plan_of_a_cpu_is_bound_by_what_was_measured(tmp_path: Path) -> None:
    """A step at batch 1 reads each weight that is used once, and pays for its operators."""
    file = tmp_path / "cpu.json"
    write(calibrate(TINY, idle), file)
    name, rates = calibrated(file)
    plan = Deployment(model("lite"), name, rates, Layout(), precision("bf16"), context=1).at(1)
    read = model("lite").activated_parameters(8) * 2
    assert plan.step.seconds > read / rates.memory_bytes_per_second
    assert plan.step.overhead_seconds == rates.layer_seconds
