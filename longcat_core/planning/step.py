"""The time of one decode step: a layer's stages, whose tracks run beside each other, and what is around the layers."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from longcat_core.parallel.schedule import DENSE_SERIAL, SCHEDULES, Schedule
from longcat_core.planning.costs import Cost, Load, Timed, dense_layer_costs, head_cost, layer_costs, mtp_costs, timed
from longcat_core.planning.layout import Layout, Precision
from longcat_core.planning.memory import weights
from longcat_core.planning.models import Model
from longcat_core.planning.rates import Rates


@dataclass(frozen=True)
class StageTime:
    name: str
    tracks: tuple[tuple[Timed, ...], ...]
    """Without operations that the deployment does not have."""
    seconds: float


@dataclass(frozen=True)
class StepTime:
    stages: tuple[StageTime, ...]
    """Of one layer with experts."""
    layers: int
    """With experts."""
    overhead_seconds: float
    """Of such a layer, beside its stages."""
    dense_layer_seconds: float
    """Of all layers with a dense FFN in place of experts."""
    head_seconds: float
    mtp_seconds: float
    """Of all drafts."""
    engine_seconds: float = 0.0
    """Fixed cost, outside of the layers."""

    @property
    def layer_seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages) + self.overhead_seconds

    @property
    def seconds(self) -> float:
        around = self.dense_layer_seconds + self.head_seconds + self.mtp_seconds + self.engine_seconds
        return self.layers * self.layer_seconds + around


def schedule(model: Model, overlap: str) -> Schedule:
    """What runs beside what in a layer with experts.

    Raises:
        ValueError: if there is no such overlap, or the model has no shortcut to overlap within a batch.
    """
    if overlap not in SCHEDULES:
        raise ValueError(f"overlap: {overlap!r}, wanted one of {', '.join(SCHEDULES)}")
    shortcut, plain = SCHEDULES[overlap]
    found = shortcut if model.is_shortcut else plain
    if found is None:
        raise ValueError(f"overlap: {overlap!r} needs a shortcut beside the experts, which {model.name} has not")
    return found


def step_time(
    model: Model, layout: Layout, precision: Precision, rates: Rates, overlap: str, load: Load, drafts: int = 0
) -> StepTime:
    """drafts: of the MTP layer, after the main model; `load.rows` has them already."""
    plan = schedule(model, overlap)
    if rates.in_cache is not None:
        cached = load.requests * load.context * model.cache_bytes_a_token(precision.cache)
        if weights(model, layout, precision).total + cached <= rates.cache_bytes:
            rates = rates.in_cache
    # Two batches take turns: a stage is run once for each, and weights are read twice.
    turns = plan.batches if rates.splits_batches else 1
    of_turn = load.half() if turns == 2 else load
    costs = layer_costs(model, layout, precision, rates, of_turn)
    stages = _stages(plan, costs, rates, turns)
    dense = 0.0
    if model.first_dense_layers:
        of_dense = dense_layer_costs(model, layout, precision, rates, load)
        layer = sum(stage.seconds for stage in _stages(DENSE_SERIAL, of_dense, rates))
        dense = model.first_dense_layers * (layer + rates.overhead_seconds(load.requests, load.rows) / 2)
    one = Load(load.requests, load.requests, load.context, load.ffn_experts)
    head = timed("head", head_cost(model, layout, load), rates).seconds
    of_mtp = mtp_costs(model, layout, precision, rates, one)
    mtp = sum(timed(name, cost, rates).seconds for name, cost in of_mtp.items())
    overhead = rates.overhead_seconds(of_turn.requests, load.rows)
    return StepTime(
        stages=stages,
        layers=model.layers - model.first_dense_layers,
        overhead_seconds=overhead * (1 if model.attentions_a_layer > 1 else 0.5) * turns,
        dense_layer_seconds=dense,
        head_seconds=0.0 if "head" in rates.omitted else head,
        mtp_seconds=0.0 if "mtp" in rates.omitted else drafts * mtp,
        engine_seconds=rates.step_seconds + load.requests * rates.request_seconds,
    )


def _stages(plan: Schedule, costs: Mapping[str, Cost], rates: Rates, turns: int = 1) -> tuple[StageTime, ...]:
    found = []
    for stage in plan.stages:
        tracks = tuple(
            tuple(timed(name, costs[name], rates) for name in track if name in costs) for track in stage.tracks
        )
        times = [sum(each.seconds for each in track) for track in tracks if track]
        if not times:
            continue
        longest = max(times)
        # What is not saved of the shorter tracks comes on top.
        seconds = longest + (1 - rates.overlap_share) * (sum(times) - longest)
        found.append(StageTime(stage.name, tuple(track for track in tracks if track), turns * seconds))
    return tuple(found)
