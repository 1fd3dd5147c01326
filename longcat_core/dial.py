"""The dial: what holds the mean of FFN experts a token at a target while a model serves, layer by layer.

A bias of the zero experts takes part in the choice of experts, as `e_score_correction_bias` does, and never in their
weights. The report holds a budget so in training (section 2.1.1), with a PID controller. Here the router does not learn
meanwhile: it answers a bias in the step that has it, so that an integral alone is enough, and what a proportional and
a derivative term would add is the noise of the step before.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longcat_core.config import LongcatConfig

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


def obstacles_to_dial(config: LongcatConfig, target: float) -> list[str]:
    """Why the mean of FFN experts a token cannot be held at `target`."""
    fewest, most = possible_targets(config)
    if fewest < target < most:
        return []
    if fewest == most:
        return ["this model has no zero experts to choose instead"]
    return [f"{target:g}, wanted more than {fewest:g} and less than {most:g}, the FFN experts that a token can have"]


class Dial:
    """The settings of some layers of a model. Not a module, as they are no weights.

    A step's arithmetic is on the device, in place and without waiting for it, so that a captured graph has it whenever
    it is replayed. It depends on nothing but the choices: ranks that have the same have the same settings.
    """

    def __init__(self, config: LongcatConfig, target: float, layers: int, device: torch.device) -> None:
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
        """FFN experts a token."""
        return self._target

    def turn(self, target: float) -> None:
        """Hold another mean from the next step on; settings begin where they are. Called where steps are launched, so
        that a device does it between two of them; ranks of a group between the same two.

        Raises:
            ValueError: for a target that no bias holds, or that is no number. The dial is then as it was.
        """
        target = _as_number(target)
        if obstacles := obstacles_to_dial(self._config, target):
            raise ValueError(f"a dial at {obstacles[0]}")
        self._target = target
        self._target_on_device.fill_(target)  # where a captured step reads it

    def reset(self) -> None:
        """Begin anew with the model as published, at the same target. Called as `turn`."""
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
    """The routers that a rank has and their dial. Ranks that have the same tokens make the same choices."""

    def __init__(self, config: LongcatConfig, target: float, routers: Sequence[Any], device: torch.device) -> None:
        """routers: an engine's, with `e_score_correction_bias`, and `dialled`, which is set here and replaces it.

        Raises:
            ValueError: for a target that no bias holds.
        """
        self.dial, self._routers = Dial(config, target, len(routers), device), routers
        for router in routers:
            router.dialled = torch.zeros_like(router.e_score_correction_bias)

    def begin_step(self) -> None:
        """Write the biases that the routers are to choose by."""
        published = [router.e_score_correction_bias for router in self._routers]
        self.dial.begin_step(published, [router.dialled for router in self._routers])

    def end_step(self, ids: Tensor, is_real: Tensor | None) -> None:
        """ids: int32 [layers, T, K]; is_real: int64 [T] or less, 1 for a token, or None where nothing is one."""
        if is_real is not None:
            self.dial.end_step(ids[:, : len(is_real)], is_real)


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
