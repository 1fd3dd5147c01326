"""Experts of data-parallel ranks on a CPU: core's exchange as operators, in whose time the dense path runs."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from vllm.config import get_current_vllm_config
from vllm.distributed import get_ep_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.utils.torch_utils import direct_register_custom_op

from longcat_core.layers.routing import Routing
from longcat_core.parallel.exchange import AllToAll, Combine, Dispatch, Exchange
from longcat_vllm.devices.branch import Branch


@lru_cache(maxsize=1)
def link_of(group: ProcessGroup) -> AllToAll:
    """One for the layers of a model, which send one after the other."""
    return AllToAll(group)


class Exchanged(Branch):
    """torch.compile sees three operators, which hand on empty tensors. What is on its way is kept here.

    Inductor moves an operator to where its result is read, to save memory. So each is said to write what is made before
    it and read after it.
    """

    def __init__(self, experts: MoERunner) -> None:
        self.experts = experts
        link, placement = link_of(get_ep_group().device_group), experts.expert_map_manager.placement_strategy
        num_experts = experts.moe_config.num_experts
        holders = torch.zeros(num_experts, dtype=torch.int64)
        for rank in range(link.size):
            _, expert_map, _ = determine_expert_map(link.size, rank, num_experts, placement)
            assert expert_map is not None, "a rank of several has a map"
            holders[expert_map >= 0] = rank
        self.exchange = Exchange(link, holders)
        self.dispatch: Dispatch | None = None
        self.combine: Combine | None = None
        self.name = f"{experts.layer_name}.exchange"
        get_current_vllm_config().compilation_config.static_forward_context[self.name] = self

    def begin(self, hidden_states: Tensor, routing: Routing, between: Tensor) -> Tensor:
        return torch.ops.longcat.exchange_begin(hidden_states, routing.ids, routing.weights, between, self.name)

    def compute(self, begun: Tensor, between: Tensor) -> Tensor:
        return torch.ops.longcat.exchange_compute(begun, between, self.name)

    def end(self, computed: Tensor, hidden_states: Tensor, routing: Routing, between: Tensor) -> Tensor:
        return torch.ops.longcat.exchange_end(computed, hidden_states, between, self.name)


def _of(name: str) -> Exchanged:
    exchanged: Exchanged = get_forward_context().no_compile_layers[name]
    return exchanged


def _begin(hidden_states: Tensor, ids: Tensor, weights: Tensor, between: Tensor, name: str) -> Tensor:
    layer = _of(name)
    layer.dispatch = layer.exchange.dispatch(hidden_states, ids, weights)
    return hidden_states.new_empty(0)


def _compute(begun: Tensor, between: Tensor, name: str) -> Tensor:
    layer = _of(name)
    assert layer.dispatch is not None
    choices = layer.exchange.received(layer.dispatch)
    sums: Any = layer.experts.routed_experts.forward_modular(
        x=choices.hidden_states, topk_weights=choices.weights, topk_ids=choices.ids
    )
    layer.combine, layer.dispatch = layer.exchange.combine(layer.dispatch, sums), None
    return begun.clone()


def _end(computed: Tensor, hidden_states: Tensor, between: Tensor, name: str) -> Tensor:
    layer = _of(name)
    assert layer.combine is not None
    combined, layer.combine = layer.exchange.combined(layer.combine), None
    return combined


def _begin_fake(hidden_states: Tensor, ids: Tensor, weights: Tensor, between: Tensor, name: str) -> Tensor:
    return hidden_states.new_empty(0)


def _compute_fake(begun: Tensor, between: Tensor, name: str) -> Tensor:
    return torch.empty_like(begun)


def _end_fake(computed: Tensor, hidden_states: Tensor, between: Tensor, name: str) -> Tensor:
    return torch.empty_like(hidden_states)


_LIBRARY = torch.library.Library("longcat", "FRAGMENT")
direct_register_custom_op("exchange_begin", _begin, ["between"], _begin_fake, _LIBRARY)
direct_register_custom_op("exchange_compute", _compute, ["between"], _compute_fake, _LIBRARY)
direct_register_custom_op("exchange_end", _end, ["between"], _end_fake, _LIBRARY)
