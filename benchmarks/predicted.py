"""What `longcat plan` predicts for a record of `bench_plan.py`, and the fixed costs that it rests on."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from longcat_core.planning import cpu
from longcat_core.planning.figures import Figure
from longcat_core.planning.layout import Layout, precision
from longcat_core.planning.models import of_config
from longcat_core.planning.plan import Deployment

FEW, MANY = 32, 64
"""Requests: as many as layers are compiled for, and more."""
LAYERS = 1, 5
"""Of the two models of almost nothing."""
CLAIMED = 0.25
"""Predictions of `CLAIMED_MODELS` are off by at most so much of what was measured."""
CLAIMED_MODELS = ("123M", "622M")
"""Not Nano, whose steps are little but fixed costs."""


class Case(NamedTuple):
    """Of a model of almost nothing."""

    layers: int
    streams: bool
    """Whether a processor's cache is emptied in each layer."""
    requests: int


def fixed_us(seconds: Mapping[Case, float]) -> dict[str, float]:
    """Figures of `planning/data/cpu.json`, in us, from decode steps with 1, `FEW` and `MANY` requests."""
    found: dict[str, float] = {}
    by_request, by_layer_and_request = [], []
    few, many = LAYERS
    for streams in (False, True):

        def step(layers: int, requests: int, streams: bool = streams) -> float:
            return seconds[Case(layers, streams, requests)] * 1e6

        def more(layers: int) -> float:
            """Of each request after the first."""
            return (step(layers, FEW) - step(layers, 1)) / (FEW - 1)

        of_layer_and_request = (more(many) - more(few)) / (many - few)
        of_request = more(few) - few * of_layer_and_request
        layer = (step(many, 1) - step(few, 1)) / (many - few) - of_layer_and_request
        in_many = (step(many, MANY) - step(few, MANY)) / (many - few) - MANY * of_layer_and_request
        before = "cold_" if streams else ""
        found[f"{before}step_us"] = step(few, 1) - few * (layer + of_layer_and_request) - of_request
        found[f"{before}layer_us"] = layer
        found[f"{before}many_rows_layer_us"] = in_many
        by_request.append(of_request)
        by_layer_and_request.append(of_layer_and_request)
    found["request_us"] = sum(by_request) / len(by_request)
    found["layer_request_us"] = sum(by_layer_and_request) / len(by_layer_and_request)
    return found


def predicted_seconds(
    config: Mapping[str, Any], calibration: Mapping[str, float], requests: int, context: int
) -> float:
    """Of a decode step. config: as published; calibration: values of the figures of `longcat plan --calibrate`."""
    today = datetime.date.today()
    figures = {name: Figure(name, value, "", "measured", "calibration", today) for name, value in calibration.items()}
    rates = cpu.rates_of("", figures)
    deployment = Deployment(of_config(config, ""), "", rates, Layout(), precision("bf16"), context)
    return deployment.step(requests).seconds


class Compared(NamedTuple):
    model: str
    requests: int
    context: int
    measured: float
    """Seconds of a decode step."""
    before: float
    """Predicted with the calibration right before the model's steps."""
    after: float

    @property
    def predicted(self) -> float:
        return (self.before + self.after) / 2

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def compared(record: Mapping[str, Any]) -> Iterator[Compared]:
    """record: of `results/ENGINE/plan.json`."""
    settings = record["settings"]
    for row in record["rows"]:
        of_model = settings[row["model"]]
        before, after = (
            predicted_seconds(of_model["config"], of_model[when], row["requests"], row["context"])
            for when in ("before", "after")
        )
        yield Compared(row["model"], row["requests"], row["context"], row["ms"] / 1e3, before, after)
