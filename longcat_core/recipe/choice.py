"""Which layers of a model stay in bf16: those that the rule says, or what a number of bytes allows."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from longcat_core.recipe.calibration import Measured
from longcat_core.recipe.layers import DRAFT_LAYER, Layer
from longcat_core.recipe.rule import Keep, Score, Thresholds


def scores(layers: Sequence[Layer], measured: Mapping[str, Measured], thresholds: Thresholds) -> dict[str, Score]:
    """By name, of all layers but the draft layer's, which is kept as a whole or not, by choice."""
    judged = {layer.name: measured[layer.name] for layer in layers if layer.kind != DRAFT_LAYER}
    reached = {name: each for name, each in judged.items() if each.rows}
    kinds: dict[str, list[float]] = {}
    for layer in layers:
        if layer.name in reached:
            kinds.setdefault(layer.kind, []).append(reached[layer.name].output_error_rms)
    usual_rms = {kind: _median(values) for kind, values in kinds.items()}
    usual_input = _median([each.largest_input for each in reached.values()])
    usual_weight = _median([each.weight_error for each in judged.values()])
    usual_output = _median([each.output_error for each in reached.values()])
    found = {}
    for layer in layers:
        if layer.name not in judged:
            continue
        each = judged[layer.name]
        error, activation = _over(each.weight_error, thresholds.relative * usual_weight), None
        if each.rows:
            activation = _over(each.largest_input, thresholds.activation * usual_input)
            error = max(
                error,
                _over(each.output_error, thresholds.relative * usual_output),
                _over(each.output_error_rms, thresholds.absolute * usual_rms[layer.kind]),
            )
        found[layer.name] = Score(activation, error)
    return found


def kept(layers: Iterable[Layer], scores: Mapping[str, Score], keep: Keep) -> set[str]:
    """The groups with a layer that is to be kept; the rule is for a layer, and then its whole group is kept."""
    return {layer.group for layer in layers if layer.name in scores and scores[layer.name].is_kept(keep)}


def within_budget(
    layers: Sequence[Layer], measured: Mapping[str, Measured], extra_bytes: Callable[[Layer], int], budget: int
) -> set[str]:
    """The groups to keep for at most `budget` bytes more than all in FP8 takes.

    Those with the greatest relative output error for each byte come first (of an expert that no token reached, the
    error of its weights); a group that no longer fits is passed over. extra_bytes: what a layer takes more in bf16.
    """
    errors: dict[str, float] = {}
    extra: dict[str, int] = {}
    for layer in layers:
        if layer.kind != DRAFT_LAYER:
            each = measured[layer.name]
            error = each.output_error if each.rows else each.weight_error
            errors[layer.group] = max(errors.get(layer.group, 0.0), error)
            extra[layer.group] = extra.get(layer.group, 0) + extra_bytes(layer)
    found, left = set(), budget
    for group in sorted(errors, key=lambda group: (-errors[group] / extra[group], group)):
        if extra[group] <= left:
            found.add(group)
            left -= extra[group]
    return found


def _median(values: Sequence[float]) -> float:
    """The lower one of two, so that of two layers of a kind the worse one is compared with the better one."""
    return statistics.median_low(values) if values else 0.0


def _over(value: float, threshold: float) -> float:
    """A usual value of 0 leaves nothing to compare with."""
    return value / threshold if threshold else 0.0
