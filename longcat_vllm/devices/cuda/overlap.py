"""A layer's experts on a stream of their own, beside the dense path."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)
from vllm.v1.worker.workspace import use_workspace_lane

from longcat_core.layers.routing import Routing
from longcat_vllm.devices.branch import Branch

LANE = 2
"""Of vLLM's scratch memory, which attention uses too. vLLM itself has up to two lanes: a target's, and a drafter's."""


@lru_cache(maxsize=1)
def second_stream() -> Any:
    """A `torch.cuda.Stream`, one for all layers; made with the first, before any graph is captured."""
    return torch.cuda.Stream()


class SecondStream(Branch):
    """In the graph of a whole step, and outside of graphs; else all of it before anything else.

    torch.compile sees two operators. Inductor moves an operator to where its result is read, so the first is said to
    write what is read beside it, and the second takes what is made beside it. Inductor also gives memory to others once
    its last reader has run, so the second takes what the second stream reads. That has to be something that the first
    is said to write: of what is computed element by element, inductor makes one for each operator that takes it. So the
    routing is packed before the fork, and kept here.

    The allocator gives a stream's memory to that stream again. What the experts make is so safe when it is freed after
    the join, and what they read is kept until then.
    """

    def __init__(self, experts: MoERunner) -> None:
        self.experts = experts
        self.stream = second_stream()
        self.pending: tuple[Tensor, Any] | None = None
        """Between fork and join: the packed routing, and what the first stream has to wait for."""
        self.name = f"{experts.layer_name}.branch"
        get_current_vllm_config().compilation_config.static_forward_context[self.name] = self

    def begin(self, hidden_states: Tensor, routing: Routing, between: Tensor) -> Tensor:
        name: Any = _encode_layer_name(self.name)
        more = None if between is hidden_states else between  # so that no tensor is written as two arguments
        return torch.ops.longcat.branch_begin(hidden_states, routing.ids, routing.weights, more, name)

    def compute(self, begun: Tensor, between: Tensor) -> Tensor:
        return begun

    def end(self, computed: Tensor, hidden_states: Tensor, routing: Routing, between: Tensor) -> Tensor:
        name: Any = _encode_layer_name(self.name)
        return torch.ops.longcat.branch_end(computed, hidden_states, between, name)

    def fork(self, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """hidden_states: [T, H]; ids: int32 [T, K] and weights: fp32 [T, K], as in `Routing`. Returns the FFN experts'
        share, [T, H], not to be read before `join`."""
        router: Any = self.experts.router
        packed = router.pack(weights, ids)
        with use_workspace_lane(LANE):
            if not may_fork():
                return self.experts(hidden_states, packed)
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                computed: Tensor = self.experts(hidden_states, packed)
                self.pending = packed, self.stream.record_event()
        return computed

    def join(self) -> None:
        if self.pending is not None:
            torch.cuda.current_stream().wait_event(self.pending[1])
            self.pending = None


def may_fork() -> bool:
    """A graph in pieces would have to fork and join within one of them, and attention is between two."""
    is_in_pieces = get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE
    return not is_in_pieces and not BreakableCUDAGraphCapture.is_active()


def _of(name: LayerNameType) -> SecondStream:
    branch: SecondStream = get_forward_context().no_compile_layers[_resolve_layer_name(name)]
    return branch


def _begin(hidden_states: Tensor, ids: Tensor, weights: Tensor, more: Tensor | None, name: LayerNameType) -> Tensor:
    return _of(name).fork(hidden_states, ids, weights)


def _end(computed: Tensor, hidden_states: Tensor, between: Tensor, name: LayerNameType) -> Tensor:
    _of(name).join()
    return computed.clone()  # an operator's result may not be what it was given


def _begin_fake(
    hidden_states: Tensor, ids: Tensor, weights: Tensor, more: Tensor | None, name: LayerNameType
) -> Tensor:
    return torch.empty_like(hidden_states)


def _end_fake(computed: Tensor, hidden_states: Tensor, between: Tensor, name: LayerNameType) -> Tensor:
    return torch.empty_like(computed)


_LIBRARY = torch.library.Library("longcat", "FRAGMENT")
direct_register_custom_op("branch_begin", _begin, ["hidden_states", "more"], _begin_fake, _LIBRARY)
direct_register_custom_op("branch_end", _end, [], _end_fake, _LIBRARY)
