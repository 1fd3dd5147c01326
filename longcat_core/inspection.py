"""What the router and the drafter of a model do with one text, token by token, in the reference."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longcat_core.config import LongcatConfig
from longcat_core.dial import breaking_points, obstacles_to_dial, settled_bias
from longcat_core.layers.routing import Routing, expert_rows
from longcat_core.reference import LongcatForCausalLM, Router


class Inspection(NamedTuple):
    """What was found in a text of T tokens, which the model read as one sequence."""

    tokens: Tensor
    """int64 [T]."""
    ffn_experts: Tensor
    """int64 [layers, T]: how many of each token's expert choices are FFN experts; the others are zero experts."""
    load: Tensor
    """int64 [layers, FFN experts]: tokens of each."""
    nats: Tensor
    """fp32 [T]: the surprisal of each token, -log of its probability; NaN for the first."""
    drafts: Tensor | None
    """bool [T]: whether the MTP layer's draft for a position is the model's own greedy token there, so that an engine
    would accept it. The first two positions have no draft, and are False. None without an MTP layer."""

    def activated_parameters(self, config: LongcatConfig) -> Tensor:
        """fp64 [T], see `LongcatConfig.activated_parameters`."""
        mean = self.ffn_experts.double().mean(dim=0).tolist()
        return torch.tensor([config.activated_parameters(each) for each in mean], dtype=torch.float64)

    def draft_acceptance(self) -> float | None:
        """The share of drafts that are accepted; None if there are no drafts."""
        if self.drafts is None or len(self.drafts) < 3:
            return None
        return float(self.drafts[2:].double().mean())


@torch.no_grad()
def inspect(model: LongcatForCausalLM, tokens: list[int]) -> Inspection:
    """Read a text as one sequence.

    Raises:
        ValueError: if there are no tokens, or more than the model's context.
    """
    config, device = model.config, model.lm_head.weight.device
    if not 0 < len(tokens) <= config.max_position_embeddings:
        raise ValueError(f"{len(tokens)} tokens, wanted 1 to the model's context of {config.max_position_embeddings}")
    ids = torch.tensor([tokens], device=device)
    with routings(model) as noted:
        logits, hidden, _ = model(ids)
    drafts = None
    if model.model.mtp is not None:
        drafts = torch.zeros(len(tokens), dtype=torch.bool)
        if len(tokens) > 2:
            drafted = model.draft(hidden[:, :-2], ids[:, 1:-1])[0].argmax(dim=-1)
            drafts[2:] = (drafted == logits[:, 1:-1].argmax(dim=-1))[0].cpu()
    nats = torch.full((len(tokens),), math.nan)
    nats[1:] = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none").cpu()
    return Inspection(
        tokens=ids[0].cpu(),
        ffn_experts=torch.stack([(each.ids >= 0).sum(dim=-1) for each in noted]).cpu(),
        load=torch.stack([expert_rows(each.ids, config.n_routed_experts) for each in noted]).cpu(),
        nats=nats,
        drafts=drafts,
    )


def routers(model: LongcatForCausalLM) -> list[Router]:
    """One a layer, in order."""
    return [module for module in model.modules() if isinstance(module, Router)]


@contextmanager
def held(model: LongcatForCausalLM, ffn_experts: float) -> Iterator[list[float]]:
    """Within the `with` block, every layer takes `ffn_experts` FFN experts a token, on the mean of each call's tokens:
    what a server's dial holds once it has settled on them. Yields the bias of a zero expert in each layer of the last
    call.

    Raises:
        ValueError: if no bias holds that mean.
    """
    if obstacles := obstacles_to_dial(model.config, ffn_experts):
        raise ValueError(f"a mean of FFN experts of {obstacles[0]}")
    n_routed_experts, top_k = model.config.n_routed_experts, model.config.moe_topk
    published = [router.e_score_correction_bias.clone() for router in routers(model)]
    biases = [0.0] * len(published)

    @torch.no_grad()
    def hold(layer: int, router: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(router, Router)
        scores = F.linear(inputs[0].float(), router.classifier.weight.float()).softmax(dim=-1)
        points = breaking_points(scores, published[layer], n_routed_experts, top_k)
        biases[layer] = settled_bias(points, ffn_experts)
        router.e_score_correction_bias.copy_(published[layer])
        router.e_score_correction_bias[n_routed_experts:] += biases[layer]

    hooks = [router.register_forward_pre_hook(partial(hold, n)) for n, router in enumerate(routers(model))]
    try:
        yield biases
    finally:
        for hook in hooks:
            hook.remove()
        for router, own in zip(routers(model), published, strict=True):
            router.e_score_correction_bias.copy_(own)


@contextmanager
def routings(model: LongcatForCausalLM) -> Iterator[list[Routing]]:
    """Within the `with` block, what every router of the model returns, in the order they run."""
    noted: list[Routing] = []

    def note(router: nn.Module, inputs: object, routing: Routing) -> None:
        noted.append(routing)

    hooks = [router.register_forward_hook(note) for router in routers(model)]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()
