"""One rank of EP 128 at batch 96 with one draft, part by part, as the LongCat-Flash report's Table 7 has it in theory.

Communication is not measured, as there is one GPU: dispatch and combine of the table are links.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import Case, Context, Row, rows
from benchmarks.gpu.checks import LIMITS, check, truth
from benchmarks.gpu.inputs import Batch, random_batch
from benchmarks.gpu.layer import AttentionCore, RankLayer, Step, two_products
from benchmarks.gpu.our_kernels import OurMoE
from benchmarks.gpu.sizes import Deployment
from benchmarks.gpu.stages.layer import attention_core
from benchmarks.gpu.vllm_kernels import FlashAttention3, TritonMoE
from longcat_core.kernels.combine import weighted_sum
from longcat_core.kernels.quantize import quantize
from longcat_core.kernels.route import route
from longcat_core.kernels.router_product import router_product

DRAFTS = 1
PARTS = {
    "attention": ("FlashAttention 3", "two products"),
    "MoE": ("ours", "vLLM, dropped"),
    "router and routing": ("ours",),
    "rows in FP8": ("ours",),
    "combine": ("ours",),
    "dense FFN": ("torch",),
    "layer": ("ours, one stream", "ours, two streams"),
}
"""What is measured, and by which kernels. A layer has two attentions and two dense FFNs; `layer` is all of it, with the
attention that is there."""


@dataclass(frozen=True)
class Rank:
    """What the parts work on."""

    layer: RankLayer
    """Attention and dense FFNs in bf16 and whole, experts in FP8."""
    step: Step
    hidden_states: Tensor
    """bf16 [T, H]: of this rank's requests, with their drafts."""
    received: Batch
    """Rows that other ranks sent to this rank's experts."""
    outputs: Tensor
    """bf16 [T, K, H]: what other ranks sent back."""


def stage(context: Context) -> Iterator[Row]:
    made: list[Rank] = []
    cases = []
    for part, kernels in PARTS.items():
        for kernel in kernels:
            if kernel.endswith("two streams") and 2 not in context.sizes.layer_streams:
                continue
            fields = {
                "ranks": context.sizes.ranks,
                "batch": context.sizes.batch,
                "context": context.sizes.context,
                "part": part,
                "kernel": kernel,
            }
            cases.append(Case(fields, partial(_run, context, made, part, kernel)))
    yield from rows(cases, context)


def rank(context: Context) -> Rank:
    sizes, config = context.sizes, context.sizes.config
    tokens, local = sizes.batch * (1 + DRAFTS), config.n_routed_experts // sizes.ranks
    layer = RankLayer(config, 1, local, "fp8", context.device)
    x = layer.hidden_states(tokens)
    return Rank(
        layer=layer,
        step=layer.step(sizes.batch, 1 + DRAFTS, sizes.context),
        hidden_states=x,
        received=random_batch(config, Deployment("data", local), tokens, "random", False, context.device),
        outputs=x.unsqueeze(1).repeat(1, config.moe_topk, 1),
    )


def _run(context: Context, made: list[Rank], part: str, kernel: str) -> dict[str, Any]:
    if not made:
        made.append(rank(context))
    calls: dict[str, Callable[[Context, Rank, str], dict[str, Any]]] = {
        "attention": _attention,
        "MoE": _moe,
        "router and routing": _routing,
        "rows in FP8": _rows_in_fp8,
        "combine": _combine,
        "dense FFN": _dense,
        "layer": _layer,
    }
    return calls[part](context, made[0], kernel)


def _core(context: Context, kernel: str) -> AttentionCore:
    if kernel == "two products":
        return two_products
    return FlashAttention3(context.sizes.batch, 1 + DRAFTS, context.sizes.context, context.device)


def _attention(context: Context, of: Rank, kernel: str) -> dict[str, Any]:
    core = _core(context, kernel)

    def call() -> Tensor:
        return of.layer.attend(0, of.hidden_states, of.step, core)

    error = check(call(), of.layer.attend(0, of.hidden_states, of.step, two_products), LIMITS["16 bit"])
    return {**asdict(context.timer(call)), "worst_token_error": error}


def _moe(context: Context, of: Rank, kernel: str) -> dict[str, Any]:
    weights, received = of.layer.experts, of.received
    if kernel == "ours":
        call = partial(OurMoE(weights, context.device_name, context.sizes.is_compiled), received)
    else:
        local = replace(context.sizes.config, n_routed_experts=weights.w2.shape[0])
        call = partial(TritonMoE(local, weights, context.sizes.is_compiled), received)
    error = check(call(), truth(received, weights), LIMITS["fp8"])
    return {**asdict(context.timer(call)), "worst_token_error": error, "rows": len(received.hidden_states)}


def _routing_of(of: Rank) -> Callable[[Tensor], Any]:
    config = of.layer.config
    bias = torch.zeros(config.num_experts, device=of.layer.device)
    return lambda x: route(
        router_product(x, of.layer.router),
        bias,
        n_routed_experts=config.n_routed_experts,
        top_k=config.moe_topk,
        routed_scaling_factor=config.routed_scaling_factor,
    )


def _routing(context: Context, of: Rank, kernel: str) -> dict[str, Any]:
    choose = _routing_of(of)
    return asdict(context.timer(lambda: choose(of.hidden_states)))


def _rows_in_fp8(context: Context, of: Rank, kernel: str) -> dict[str, Any]:
    return asdict(context.timer(lambda: quantize(of.hidden_states)))


def _combine(context: Context, of: Rank, kernel: str) -> dict[str, Any]:
    routing = _routing_of(of)(of.hidden_states)
    experts = OurMoE(of.layer.experts, context.device_name, context.sizes.is_compiled)

    def call() -> Tensor:
        summed = weighted_sum(of.outputs, routing.ids, routing.weights, torch.empty_like(of.hidden_states))
        return experts.add_identity(summed, of.hidden_states, routing.identity)

    # Every expert here gives x, so the result is x times all weights.
    total = (routing.weights.sum(dim=1) + routing.identity).unsqueeze(-1)
    error = check(call(), total * of.hidden_states.float(), LIMITS["16 bit"])
    return {**asdict(context.timer(call)), "worst_token_error": error}


def _dense(context: Context, of: Rank, kernel: str) -> dict[str, Any]:
    return asdict(context.timer(lambda: of.layer.dense(0, of.hidden_states)))


def _layer(context: Context, of: Rank, kernel: str) -> dict[str, Any]:
    """All that this rank computes in a layer, in a graph: the rows of others in place of those that it would send."""
    name, core = attention_core(context, context.sizes.batch, 1 + DRAFTS, context.sizes.context)
    choose, experts = _routing_of(of), OurMoE(of.layer.experts, context.device_name, context.sizes.is_compiled)

    def moe(x: Tensor) -> Tensor:
        routing = choose(x)
        quantize(x)
        experts(of.received)
        summed = weighted_sum(of.outputs, routing.ids, routing.weights, torch.empty_like(x))
        return experts.add_identity(summed, x, routing.identity)

    side = torch.cuda.Stream() if kernel.endswith("two streams") else None
    timing = context.timer(lambda: of.layer(of.hidden_states, of.step, moe, core, side))
    return {**asdict(timing), "attention": name}
