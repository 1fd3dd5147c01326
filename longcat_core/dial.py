"""The dial: what holds the mean of FFN experts a token at a target while a model serves, layer by layer.

A bias of the zero experts takes part in the choice of experts, as `e_score_correction_bias` does, and never in their
weights. The report holds a budget so in training (section 2.1.1), with a PID controller. Here the router does not learn
meanwhile: it answers a bias in the step that has it, so that an integral alone is enough, and what a proportional and
a derivative term would add is the noise of the step before.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.observation import shared_target
from longcat_core.observation.expert_choices import stacked
from longcat_core.target_by_queue import Target, TargetByQueue

GAIN = 0.6
"""What is added to a layer's setting in a step of very many tokens, if all their choices are one too many."""
HALF_WEIGHT = 256
"""Tokens of a step that moves a setting half as far as one of very many, as the mean of few is mostly chance."""


def possible_targets(config: LongcatConfig) -> tuple[float, float]:
    """The fewest and the most FFN experts that a token can have; what is held lies between, as a bias that holds one of
    them would have to grow for ever."""
    most = min(config.moe_topk, config.n_routed_experts)
    return float(config.moe_topk - min(config.moe_topk, config.zero_expert_num)), float(most)


def _as_number(given: object) -> float:
    """given: by who turns a dial while a server runs. An integer that no fp64 has is infinite.

    Raises:
        ValueError: if it is no number, nor text that is one.
    """
    try:
        return float(given) if isinstance(given, int | float) and not isinstance(given, bool) else float(str(given))
    except OverflowError:
        return math.inf
    except ValueError:
        raise ValueError(f"a dial at {given!r}, wanted a number") from None


def _as_target(given: object) -> Target:
    """
    Raises:
        ValueError: if it is neither a number nor two of them.
    """
    if not isinstance(given, list | tuple):
        return _as_number(given)
    if len(given) != 2:
        raise ValueError(f"a dial at {given!r}, wanted a number or two bounds")
    return _as_number(given[0]), _as_number(given[1])


def obstacles_to_dial(config: LongcatConfig, target: Target) -> list[str]:
    """Why the mean of FFN experts a token cannot be held at `target`, or not at one of its bounds."""
    fewest, most = possible_targets(config)
    numbers = [target] if isinstance(target, int | float) else target
    wrong = [number for number in numbers if not fewest < number < most]
    if wrong and fewest == most:
        return ["this model has no zero experts to choose instead"]
    wanted = f"wanted more than {fewest:g} and less than {most:g}, the FFN experts that a token can have"
    return [f"{number:g}, {wanted}" for number in wrong]


class Dial:
    """The settings of some layers of a model. Not a module, as they are no weights.

    A step's arithmetic is on the device, in place and without waiting for it, so that a captured graph has it whenever
    it is replayed. It depends on nothing but the choices: ranks that have the same have the same settings.
    """

    def __init__(self, config: LongcatConfig, target: Target, layers: int, device: torch.device) -> None:
        """
        Raises:
            ValueError: for a target that no bias holds.
        """
        self._config, self._experts = config, config.num_experts
        self._target_on_device = torch.zeros((), dtype=torch.float32, device=device)
        self.turn(target)
        self._furthest = math.asinh(config.num_experts)  # a bias of 1, which is more than any score
        self.settings = torch.zeros(layers, dtype=torch.float32, device=device)
        """fp32 [layers]: asinh of the bias, in units of the mean score."""
        self._is_zero_expert = (torch.arange(config.num_experts, device=device) >= config.n_routed_experts).float()

    @property
    def target(self) -> float:
        """FFN experts a token, at present."""
        return self._target

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The lesser and the greater, between which the target follows the queue; None where it stays."""
        return None if self._by_queue is None else self._by_queue.bounds

    def turn(self, target: object) -> None:
        """Hold another mean from the next step on; settings begin where they are. Called where steps are launched, so
        that a device does it between two of them; ranks of a group between the same two.

        target: a number, or two bounds, of which the greater is held first.

        Raises:
            ValueError: for a target that no bias holds, or that is neither. The dial is then as it was.
        """
        target = _as_target(target)
        if obstacles := obstacles_to_dial(self._config, target):
            raise ValueError(f"a dial at {obstacles[0]}")
        if isinstance(target, float):
            self._by_queue = None
            self.hold(target)
        else:
            self._by_queue = TargetByQueue((target[0], target[1]))
            self.hold(self._by_queue.target)

    def asked_by_queue(self, waiting: int, full_queue: int) -> float:
        """The target of the next step, for which this is called once: as `TargetByQueue.next` between two bounds."""
        return self._target if self._by_queue is None else self._by_queue.next(waiting, full_queue)

    def hold(self, target: float) -> None:
        """What `turn` does with a number that has been looked at, and leaves bounds as they are."""
        self._target = target
        self._target_on_device.fill_(target)  # where a captured step reads it

    def reset(self) -> None:
        """Begin anew with the model as published, at the same target or bounds. Called as `turn`."""
        self.settings.zero_()

    def bias(self) -> Tensor:
        """fp32 [layers], of a zero expert. Where scores are far apart, and a bias has to be large to change a choice,
        it is in units of what it is already: hence the sinh."""
        return self.settings.sinh() / self._experts

    def biases(self) -> list[float]:
        """The same as numbers. Waits for the device, so not to be called by what makes the steps."""
        return self.bias().tolist()

    def begin_step(self, published: Sequence[Tensor], chosen_by: Sequence[Tensor]) -> None:
        """Write what the layers' routers are to choose by, before each step, as weights can be loaded anew.

        published, chosen_by: fp32 [FFN experts + zero experts] of each layer; the first is left as it is.
        """
        added = self.bias().unsqueeze(-1) * self._is_zero_expert
        for own, sum_of_both, of_layer in zip(published, chosen_by, added, strict=True):
            torch.add(own, of_layer, out=sum_of_both)

    def end_step(self, ids: Tensor, is_real: Tensor) -> None:
        """Move the settings by what was chosen: ids int32 [layers, T, K], as in `Routing`; is_real: int64 [T], 1 for a
        token, 0 for a row that only pads the step. Without tokens nothing moves."""
        tokens = is_real.sum()
        taken = ((ids >= 0).sum(dim=-1) * is_real).sum(dim=-1)
        error = (taken - self._target_on_device * tokens) / (tokens + HALF_WEIGHT)
        self.settings.add_(error, alpha=GAIN / self._config.moe_topk).clamp_(-self._furthest, self._furthest)


class DialledRouters:
    """The routers that a rank has and their dial, whose target responses can name (`observation.shared_target`). Ranks
    that have the same tokens make the same choices."""

    def __init__(
        self,
        config: LongcatConfig,
        target: Target,
        routers: Sequence[Any],
        device: torch.device,
        full_queue: int | None = None,
    ) -> None:
        """routers: an engine's, with `e_score_correction_bias`, and `dialled`, which is set here and replaces it;
        full_queue: requests that wait where the lesser of two bounds is held, None for as many as run at most.

        Raises:
            ValueError: for a target that no bias holds.
        """
        self.dial, self._routers = Dial(config, target, len(routers), device), routers
        self._full_queue = full_queue
        shared_target.write(self.dial.target)
        for router in routers:
            router.dialled = torch.zeros_like(router.e_score_correction_bias)

    def turn(self, target: object) -> None:
        """As `Dial.turn`, which raises."""
        self.dial.turn(target)
        shared_target.write(self.dial.target)

    def follow_queue(
        self, waiting: int, most_running: int, before_turning: Callable[[], object] = lambda: None
    ) -> None:
        """Between two bounds, turn the dial by the requests that wait. Called before each step, as `Dial.turn`.

        before_turning: called if the target becomes another.
        """
        target = self.dial.asked_by_queue(waiting, self._full_queue or most_running)
        if target != self.dial.target:
            before_turning()
            self.dial.hold(target)
            shared_target.write(target)

    def begin_step(self) -> None:
        """Write the biases that the routers are to choose by."""
        published = [router.e_score_correction_bias for router in self._routers]
        self.dial.begin_step(published, [router.dialled for router in self._routers])

    def end_step(self, ids: Tensor | Sequence[Tensor], is_real: Tensor | None) -> None:
        """ids: int32 [T, K] of each layer, or [layers, T, K]; is_real: int64 [T] or less, 1 for a token, or None where
        nothing is one."""
        if is_real is not None:
            self.dial.end_step(stacked(ids)[:, : len(is_real)], is_real)


# -- where a dial settles ------------------------------------------------------------------------------------


def breaking_points(scores: Tensor, bias: Tensor, n_routed_experts: int, top_k: int) -> Tensor:
    """fp32 [T, K], greatest first: below the j-th of them a zero expert's bias leaves a token at least j FFN experts.

    scores: fp32 [T, FFN experts + zero experts], the router's softmax; bias: as published. A token has j of K if its
    j-th FFN expert comes before the zero expert of place K - j + 1. An infinite one means always, or never.
    """
    ranked = scores + bias
    ffn, zero = ranked[:, :n_routed_experts], ranked[:, n_routed_experts:]
    points = ranked.new_full((len(ranked), top_k), math.inf)
    points[:, ffn.shape[1] :] = -math.inf
    first = max(0, top_k - zero.shape[1])  # so many FFN experts it has whatever the bias
    last = min(top_k, ffn.shape[1])
    best_ffn = ffn.topk(last, dim=-1).values[:, first:]
    best_zero = zero.topk(top_k - first, dim=-1).values.flip(-1)[:, : last - first]
    points[:, first:last] = best_ffn - best_zero
    return points


def settled_bias(points: Tensor, target: float) -> float:
    """The bias of a zero expert with which tokens have `target` FFN experts on the mean: where a dial settles on them.

    points: [T, K], see `breaking_points`.

    Raises:
        ValueError: if no bias does that.
    """
    wanted = round(target * len(points))
    ordered = points.flatten().sort(descending=True).values
    around = ordered[max(0, wanted - 1) : wanted + 1].double()
    if len(around) < 2 or not around.isfinite().all():
        raise ValueError(f"a mean of {target:g} FFN experts: no bias of the zero experts holds it for these tokens")
    return float(around.mean())
