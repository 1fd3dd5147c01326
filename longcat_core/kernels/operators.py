"""The kernels as operators, `torch.ops.longcat`, so that torch.compile does not look into their launches.

Without side effects, and with a shape that is known beforehand: what is compiled, or captured in a graph, calls them.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from longcat_core.kernels import moe
from longcat_core.kernels import route as routing
from longcat_core.kernels import router_product as router
from longcat_core.kernels.experts import ExpertWeights
from longcat_core.layers.routing import RouterFunctions, Routing

_LIBRARY = torch.library.Library("longcat", "FRAGMENT")


def _router_product(hidden_states: Tensor, weight: Tensor) -> Tensor:
    return router.router_product(hidden_states.contiguous(), weight)


def _router_product_fake(hidden_states: Tensor, weight: Tensor) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape[0], weight.shape[0], dtype=torch.float32)


def _route(
    logits: Tensor, bias: Tensor, n_routed_experts: int, top_k: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    return routing.route(logits, bias, n_routed_experts=n_routed_experts, top_k=top_k, routed_scaling_factor=scaling)


def _route_fake(
    logits: Tensor, bias: Tensor, n_routed_experts: int, top_k: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    weights = logits.new_empty(logits.shape[0], top_k, dtype=torch.float32)
    return torch.empty_like(weights, dtype=torch.int32), weights, weights.new_empty(logits.shape[0])


def _routed_experts(
    hidden_states: Tensor,
    ids: Tensor,
    weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scales: Tensor | None,
    w2_scales: Tensor | None,
    device: str,
    spread_over: int,
) -> Tensor:
    experts = ExpertWeights(w13, w2, w13_scales, w2_scales)
    given = (hidden_states.contiguous(), ids.contiguous(), weights.contiguous(), experts, device)
    return moe.routed_experts(*given, spread_over=spread_over)


def _routed_experts_fake(hidden_states: Tensor, *_: object) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


for _name, _function, _fake in (
    ("router_product", _router_product, _router_product_fake),
    ("route", _route, _route_fake),
    ("routed_experts", _routed_experts, _routed_experts_fake),
):
    _LIBRARY.define(_name + torch.library.infer_schema(_function, mutates_args=()))
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"longcat::{_name}", _fake, lib=_LIBRARY)


def router_product(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """As `router_product.router_product`."""
    logits: Tensor = torch.ops.longcat.router_product(hidden_states, weight)
    return logits


def route(logits: Tensor, bias: Tensor, *, n_routed_experts: int, top_k: int, routed_scaling_factor: float) -> Routing:
    """As `route.route`, and as `layers.routing.route`."""
    return Routing(*torch.ops.longcat.route(logits, bias, n_routed_experts, top_k, routed_scaling_factor))


def routed_experts(
    hidden_states: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights, device: str, spread_over: int
) -> Tensor:
    """As `moe.routed_experts`, of a rank whose ids are its own already: -1 for those of other ranks."""
    of_experts = (experts.w13, experts.w2, experts.w13_scales, experts.w2_scales)
    output: Tensor = torch.ops.longcat.routed_experts(hidden_states, ids, weights, *of_experts, device, spread_over)
    return output


ROUTER = RouterFunctions(route, router_product)
