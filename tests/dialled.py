"""Traffic for a dial: what tokens choose at any bias of the zero experts, drawn at random or recorded of a model."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longcat_core.config import LongcatConfig
from longcat_core.dial import Dial, breaking_points
from longcat_core.inspection import routers
from longcat_core.reference import LongcatForCausalLM, Router

CPU = torch.device("cpu")


class Traffic(NamedTuple):
    """Tokens that steps are drawn from."""

    points: Tensor
    """fp32 [layers, T, K], as of `breaking_points`: what a layer chooses does not depend on what others do."""

    def chosen(self, tokens: Tensor, bias: Tensor) -> Tensor:
        """int32 [layers, tokens, K], as in `Routing`, but that every FFN expert is expert 0. bias: fp32 [layers]."""
        return (self.points[:, tokens] > bias.view(-1, 1, 1)).int() - 1

    def mean(self, bias: Tensor) -> Tensor:
        """fp64 [layers]: FFN experts a token, of all tokens."""
        return (self.points > bias.view(-1, 1, 1)).sum(dim=-1).double().mean(dim=-1)


def drawn(config: LongcatConfig, spread: float, layers: int = 2, tokens: int = 4096, seed: int = 0) -> Traffic:
    """Of routers whose logits have this standard deviation, over tokens of 32 dimensions that have something in common,
    and so want some experts more than others."""
    generator = torch.Generator().manual_seed(seed)
    points = []
    for _ in range(layers):
        weight = torch.randn(32, config.num_experts, generator=generator) * 32**-0.5
        hidden_states = torch.randn(tokens, 32, generator=generator) + 0.3 * torch.randn(32, generator=generator)
        bias = torch.randn(config.num_experts, generator=generator) * 0.5 / config.num_experts
        scores = (spread * hidden_states @ weight).softmax(dim=-1)
        points.append(breaking_points(scores, bias, config.n_routed_experts, config.moe_topk))
    return Traffic(torch.stack(points))


@torch.no_grad()
def recorded(model: LongcatForCausalLM, sequences: Tensor) -> Traffic:
    """Of a model that reads these as it is published: int64 [sequences, tokens]."""
    config, noted = model.config, list[Tensor]()

    def note(router: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(router, Router)
        scores = F.linear(inputs[0].float(), router.classifier.weight.float()).softmax(dim=-1)
        bias = router.e_score_correction_bias
        noted.append(breaking_points(scores, bias, config.n_routed_experts, config.moe_topk))

    hooks = [router.register_forward_pre_hook(note) for router in routers(model)]
    try:
        model(sequences)
    finally:
        for hook in hooks:
            hook.remove()
    return Traffic(torch.stack(noted))


def held(dial: Dial, traffic: Traffic, steps: int, tokens: int, generator: torch.Generator) -> Tensor:
    """fp64 [steps, layers]: the mean of FFN experts of all tokens with the bias that each step has. Each has so many
    tokens, drawn anew."""
    means, is_real = [], torch.ones(tokens, dtype=torch.int64)
    for _ in range(steps):
        bias = dial.bias()
        means.append(traffic.mean(bias))
        sample = torch.randint(traffic.points.shape[1], (tokens,), generator=generator)
        dial.end_step(traffic.chosen(sample, bias), is_real)
    return torch.stack(means)


@contextmanager
def turned(model: LongcatForCausalLM, dial: Dial) -> Iterator[list[Tensor]]:
    """Within the `with` block every call of a model is a step of the dial's, as in an engine. Yields the ids [T, K] of
    each layer in the last one."""
    published = [router.e_score_correction_bias.clone() for router in routers(model)]
    chosen: list[Tensor] = []

    def begin(_: nn.Module, __: Sequence[object]) -> None:
        chosen.clear()
        dial.begin_step(published, [router.e_score_correction_bias for router in routers(model)])

    def end(_: nn.Module, __: Sequence[object], ___: object) -> None:
        ids = torch.stack(chosen)
        dial.end_step(ids, torch.ones(ids.shape[1], dtype=torch.int64))

    def note(_: nn.Module, __: Sequence[object], routing: tuple[Tensor, ...]) -> None:
        chosen.append(routing[0])

    hooks = [router.register_forward_hook(note) for router in routers(model)]
    hooks += [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()
        for router, own in zip(routers(model), published, strict=True):
            router.e_score_correction_bias.copy_(own)
