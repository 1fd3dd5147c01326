"""Decode steps that `longcat plan` predicts on a CPU, beside the measured ones of `benchmarks/results/*/plan.json`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.predicted import CLAIMED, CLAIMED_MODELS, FEW, LAYERS, MANY, Case, compared, fixed_us
from longcat_core.kernels.cpu.product import FEW_ROWS
from longcat_core.planning.cpu import ENGINES
from longcat_core.planning.figures import figures_of
from longcat_core.planning.hardware import read

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ENGINES_MEASURED = ("vllm", "sglang")


def record(engine: str, file: str = "plan.json") -> dict[str, Any]:
    return dict(json.loads((RESULTS / engine / file).read_text()))


@pytest.mark.parametrize("file", ["plan.json", "plan_again.json"])
@pytest.mark.parametrize("engine", ENGINES_MEASURED)
def test_steps_of_models_beyond_the_cache_are_predicted_within_a_quarter(engine: str, file: str) -> None:
    found = [each for each in compared(record(engine, file)) if each.model in CLAIMED_MODELS]
    assert [(each.model, each.requests) for each in found] == [(m, n) for m in CLAIMED_MODELS for n in (1, 8, 64)]
    for each in found:
        assert abs(each.error) <= CLAIMED, each


def test_the_fixed_costs_are_the_mean_of_both_engines() -> None:
    measured = [record(engine)["settings"]["fixed"] for engine in ENGINES_MEASURED]
    known = figures_of(read(ENGINES))
    assert known.keys() == measured[0].keys() == measured[1].keys()
    for name, figure in known.items():
        assert figure.value == pytest.approx(sum(each[name] for each in measured) / 2, rel=0.01), name


def test_fixed_costs_are_those_that_steps_were_made_of() -> None:
    wanted = {
        "step_us": 1000,
        "layer_us": 200,
        "many_rows_layer_us": 2000,
        "cold_step_us": 1500,
        "cold_layer_us": 400,
        "cold_many_rows_layer_us": 2500,
        "request_us": 30,
        "layer_request_us": 10,
    }
    steps = {}
    for streams in (False, True):
        before = "cold_" * streams
        for layers in LAYERS:
            for requests in (1, FEW, MANY):
                layer = wanted[f"{before}{'many_rows_' * (requests > FEW)}layer_us"] + 10 * requests
                step = wanted[f"{before}step_us"] + 30 * requests + layers * layer
                steps[Case(layers, streams, requests)] = step / 1e6
    assert fixed_us(steps) == pytest.approx(wanted)


def test_few_requests_are_those_that_layers_are_compiled_for() -> None:
    assert FEW <= FEW_ROWS < MANY


def test_the_page_marks_what_is_further_off() -> None:
    marked = re.findall(r"\*\*[+-]\d+ %\*\*", (ROOT / "docs" / "plan.md").read_text())
    found = [
        each
        for engine in ENGINES_MEASURED
        for file in ("plan.json", "plan_again.json")
        for each in compared(record(engine, file))
    ]
    assert len(marked) == sum(abs(each.error) > CLAIMED for each in found)
