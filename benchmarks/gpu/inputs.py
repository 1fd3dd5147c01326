"""Random weights, hidden states and routings of an MoE layer, and what they cost at the least."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.sizes import Deployment
from longcat_core.config import LongcatConfig
from longcat_core.kernels.experts import ExpertWeights
from longcat_core.layers.routing import Routing, route
from longcat_core.weights.blocks import FP8, quantize_blocks, scale_shape

ROUTINGS = ("random", "skewed")
SKEW = 0.5
"""Standard deviation of what a skewed router adds to the logits of an expert, whatever the token."""


@dataclass(frozen=True)
class Batch:
    """What a rank's MoE is given."""

    hidden_states: Tensor
    """bf16 [R, H]: T tokens, or the rows of other ranks' tokens as well."""
    routing: Routing
    expert_map: Tensor | None
    """int32 [experts of all ranks], or None where ids are local already."""

    @property
    def local_ids(self) -> Tensor:
        """int64 [R, K]: this rank's experts, or -1."""
        ids = self.routing.ids.long()
        if self.expert_map is None:
            return ids
        return torch.where(ids >= 0, self.expert_map[ids.clamp(min=0)].long(), -1)


@dataclass(frozen=True)
class Cost:
    """What no kernel can do without."""

    rows: int
    """Of experts' products."""
    touched_experts: int
    bytes: int
    """Weights of the experts that have rows, hidden states and result: each once."""
    operations: int


def random_logits(config: LongcatConfig, tokens: int, kind: str, generator: torch.Generator) -> Tensor:
    """fp32 [T, FFN and zero experts], of which a third are zero experts: so are about a third of the choices."""
    device = generator.device
    logits = torch.randn(tokens, config.num_experts, generator=generator, device=device)
    if kind == "skewed":
        logits += torch.randn(config.num_experts, generator=generator, device=device) * SKEW
    return logits


def random_routing(config: LongcatConfig, tokens: int, kind: str, generator: torch.Generator) -> Routing:
    logits = random_logits(config, tokens, kind, generator)
    bias = torch.zeros(config.num_experts, device=generator.device)
    return route(
        logits,
        bias,
        n_routed_experts=config.n_routed_experts,
        top_k=config.moe_topk,
        routed_scaling_factor=config.routed_scaling_factor,
    )


def random_weights(config: LongcatConfig, experts: int, precision: str, device: torch.device) -> ExpertWeights:
    """In bf16, or in FP8 with a scale for each block of 128 x 128."""
    hidden, inner = config.hidden_size, config.expert_ffn_hidden_size
    generator = torch.Generator(device).manual_seed(0)

    def numbers(rows: int, columns: int) -> Tensor:
        weight = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.bfloat16)
        return weight * columns**-0.5

    dtype = FP8 if precision == "fp8" else torch.bfloat16
    w13 = torch.empty(experts, 2 * inner, hidden, dtype=dtype, device=device)
    w2 = torch.empty(experts, hidden, inner, dtype=dtype, device=device)
    if precision != "fp8":
        for weight in (w13, w2):
            for expert in weight:
                expert.copy_(numbers(*expert.shape))
        return ExpertWeights(w13, w2)
    scales = []
    for weight in (w13, w2):
        of_weight = torch.empty(experts, *scale_shape(weight.shape[1:], (128, 128)), device=device)
        for codes, of_expert in zip(weight, of_weight, strict=True):
            quantized, blocks = quantize_blocks(numbers(*codes.shape))
            codes.copy_(quantized)
            of_expert.copy_(blocks)
        scales.append(of_weight)
    return ExpertWeights(w13, w2, *scales)


def random_batch(
    config: LongcatConfig, deployment: Deployment, tokens: int, kind: str, is_remapped: bool, device: torch.device
) -> Batch:
    """is_remapped: each choice of a zero expert is one of some FFN expert with the weight 0, so that it is computed."""
    generator = torch.Generator(device).manual_seed(tokens)
    experts, local = config.n_routed_experts, deployment.local_experts
    ranks = experts // local
    of_all = tokens if deployment.name == "tensor" else tokens * ranks
    routing = random_routing(config, of_all, kind, generator)
    if is_remapped:
        routing = routing._replace(ids=spread(routing.ids, experts))
    if deployment.name == "tensor":
        expert_map = torch.full((experts,), -1, dtype=torch.int32, device=device)
        expert_map[:local] = torch.arange(local, dtype=torch.int32, device=device)
        hidden_states = torch.randn(tokens, config.hidden_size, generator=generator, device=device).bfloat16()
        return Batch(hidden_states, routing, expert_map)
    # Only the rows of this rank's experts reach it; the identity is the business of the rank that has the token.
    is_here = (routing.ids >= 0) & (routing.ids < local)
    ids = routing.ids[is_here].unsqueeze(1).contiguous()
    weights = torch.where(routing.weights[is_here] > 0, 1.0, 0.0).unsqueeze(1)
    identity = torch.zeros(len(ids), device=device)
    hidden_states = torch.randn(len(ids), config.hidden_size, generator=generator, device=device).bfloat16()
    return Batch(hidden_states, Routing(ids, weights, identity), None)


def spread(ids: Tensor, experts: int) -> Tensor:
    """ids of -1 replaced by FFN experts in turn, so that all of them get as many."""
    in_turn = (torch.arange(ids.numel(), device=ids.device, dtype=torch.int32) * 5 % experts).view_as(ids)
    return torch.where(ids >= 0, ids, in_turn)


def cost(batch: Batch, weights: ExpertWeights) -> Cost:
    local = batch.local_ids
    counts = torch.bincount(local[local >= 0], minlength=weights.w2.shape[0])
    rows, touched = int(counts.sum()), int((counts > 0).sum())
    _, hidden, inner = weights.w2.shape
    of_expert = sum(tensor[0].numel() * tensor.element_size() for tensor in tensors(weights))
    moved = 2 * batch.hidden_states.numel() * batch.hidden_states.element_size()
    return Cost(rows, touched, touched * of_expert + moved, rows * 6 * hidden * inner)


def tensors(weights: ExpertWeights) -> list[Tensor]:
    found = (weights.w13, weights.w2, weights.w13_scales, weights.w2_scales)
    return [tensor for tensor in found if tensor is not None]
