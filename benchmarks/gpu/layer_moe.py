"""The MoE of a layer from its router to its result: ours, vLLM's, and the reference."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.cases import Context
from benchmarks.gpu.checks import truth
from benchmarks.gpu.inputs import Batch
from benchmarks.gpu.layer import MoE, RankLayer
from benchmarks.gpu.our_kernels import OurMoE
from benchmarks.gpu.vllm_kernels import TritonMoE
from longcat_core.kernels.route import route
from longcat_core.kernels.router_product import router_product
from longcat_core.layers import routing as reference
from longcat_core.layers.routing import Routing


def _expert_map(layer: RankLayer) -> Tensor:
    """That of the rank that has the first experts."""
    local = layer.experts.w2.shape[0]
    found = torch.full((layer.config.n_routed_experts,), -1, dtype=torch.int32, device=layer.device)
    found[:local] = torch.arange(local, dtype=torch.int32, device=layer.device)
    return found


def _bias(layer: RankLayer) -> Tensor:
    return torch.zeros(layer.config.num_experts, device=layer.device)


def _sizes(layer: RankLayer) -> dict[str, Any]:
    config = layer.config
    return {
        "n_routed_experts": config.n_routed_experts,
        "top_k": config.moe_topk,
        "routed_scaling_factor": config.routed_scaling_factor,
    }


def our_moe(layer: RankLayer, context: Context) -> MoE:
    """Seven launches in 16 bit and up to 1,024 choices: router product, route, those of `kernels.moe`, identity."""
    experts = OurMoE(layer.experts, context.device_name, context.sizes.is_compiled)
    bias, expert_map, sizes = _bias(layer), _expert_map(layer), _sizes(layer)

    def moe(x: Tensor) -> Tensor:
        routing = route(router_product(x, layer.router), bias, **sizes)
        return experts(Batch(x, routing, expert_map))

    return moe


def vllm_moe(layer: RankLayer, context: Context) -> MoE:
    """As the plugin has it in vLLM: router in fp32, routing compiled by torch.compile, vLLM's Triton experts."""
    experts = TritonMoE(layer.config, layer.experts, context.sizes.is_compiled)
    choose = torch.compile(reference.route, dynamic=True) if context.sizes.is_compiled else reference.route
    bias, expert_map, sizes = _bias(layer), _expert_map(layer), _sizes(layer)

    def moe(x: Tensor) -> Tensor:
        routing: Routing = choose(F.linear(x.float(), layer.router), bias, **sizes)
        return experts(Batch(x, routing, expert_map))

    return moe


def reference_moe(layer: RankLayer) -> MoE:
    bias, expert_map, sizes = _bias(layer), _expert_map(layer), _sizes(layer)

    def moe(x: Tensor) -> Tensor:
        routing = reference.route(F.linear(x.float(), layer.router), bias, **sizes)
        return truth(Batch(x, routing, expert_map), layer.experts).to(x.dtype)

    return moe
