"""Decode steps that `longcat plan` predicts on a CPU, beside the measured ones of `benchmarks/results/*/plan.json`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.predicted import CLAIMED, FEW, LAYERS, MANY, Case, compared, fixed_us
from longcat_core.kernels.cpu.product import FEW_ROWS
from longcat_core.planning.cpu import ENGINES
from longcat_core.planning.figures import figures_of
from longcat_core.planning.hardware import read

ROOT = Path(__file__).parents[2]
RECORDS = {engine: ROOT / "benchmarks" / "results" / engine / "plan.json" for engine in ("vllm", "sglang")}
MISSED = {("vllm", "Nano", 8)}
"""Engine, model and requests of what docs/plan.md lists as further off."""


def record(engine: str) -> dict[str, Any]:
    return dict(json.loads(RECORDS[engine].read_text()))


@pytest.mark.parametrize("engine", RECORDS)
def test_steps_are_predicted_within_a_quarter_but_for_those_that_are_listed(engine: str) -> None:
    found = list(compared(record(engine)))
    assert {(each.model, each.requests) for each in found} >= {("622M", 1), ("622M", 8), ("622M", 64)}
    missed = {(engine, each.model, each.requests) for each in found if abs(each.error) > CLAIMED}
    assert missed == {case for case in MISSED if case[0] == engine}


def test_the_fixed_costs_are_the_mean_of_both_engines() -> None:
    measured = [record(engine)["settings"]["fixed"] for engine in RECORDS]
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


def test_the_page_lists_what_is_further_off() -> None:
    listed = re.findall(
        r"^\| (\w+) \| (\w+) \| (\d+) \|.*\*\*[+-]\d+ %\*\*", (ROOT / "docs" / "plan.md").read_text(), re.MULTILINE
    )
    names = {"vLLM": "vllm", "SGLang": "sglang"}
    assert {(names[engine], model, int(requests)) for engine, model, requests in listed} == MISSED
