"""A layer's MoE beside its dense path: on a stream of its own, or while tokens are sent to other ranks and back."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.context import is_in_breakable_cuda_graph
from sglang.srt.model_executor.runner_backend_utils.tc_piecewise_cuda_graph.context_manager import (
    is_in_tc_piecewise_cuda_graph,
)
from sglang.srt.model_executor.runner_utils.capture_mode import get_is_capture_mode
from torch import Tensor

from longcat_core.layers.experts import Shortcut
from longcat_sglang.devices.branch import Begun, InARow

if TYPE_CHECKING:
    from longcat_sglang.moe import LongcatMoE


class SecondStream(InARow):
    """In the graph of a whole step, as SGLang's own layers do; else all of it before anything else.

    A graph in pieces has to fork and join within one piece, and attention is between two. Outside of graphs a step's
    kernels are launched no faster than they run, unless it has many tokens, which leave no room beside them.

    The allocator gives a stream's memory to that stream again. What the MoE makes is freed after the join, and what it
    reads is kept until then by `Begun`.
    """

    def __init__(self, stream: Any) -> None:
        """stream: a `torch.cuda.Stream`, made before any graph is captured."""
        self._stream = stream

    def begin(self, moe: LongcatMoE, hidden_states: Tensor, choices: list[Tensor] | None) -> Begun:
        if not is_captured_whole():
            return super().begin(moe, hidden_states, choices)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            shortcut = moe(hidden_states, choices)
            return Begun(shortcut, hidden_states, pending=self._stream.record_event())

    def end(self, moe: LongcatMoE, computed: Begun) -> Shortcut:
        if computed.pending is not None:
            torch.cuda.current_stream().wait_event(computed.pending)
        return super().end(moe, computed)


class Exchange(InARow):
    """The report's four stages, by the halves of DeepEP's dispatch and combine in SGLang's dispatcher; in graphs in
    pieces all of it before anything else, as SGLang leaves such a graph for the whole of an exchange.

    With DeepEP's normal kernels the first halves only note when their input was there. The second ones launch, on a
    stream of DeepEP's that waits for nothing later, so that what was launched between the two runs beside it. With its
    low-latency kernels the first halves send and the second ones receive, both in the step's own stream. Either way the
    dispatcher keeps what it sends, and DeepEP tells the allocator of its stream.

    Nothing else of a layer is on its way at that time, as the next layer's first half comes after this one's last.
    """

    def begin(self, moe: LongcatMoE, hidden_states: Tensor, choices: list[Tensor] | None) -> Begun:
        if is_in_pieces():
            return super().begin(moe, hidden_states, choices)
        routing, chosen = moe.choose(hidden_states, choices)
        moe.experts.dispatcher.dispatch_a(hidden_states=hidden_states, topk_output=chosen)
        return Begun(hidden_states=hidden_states, routing=routing)

    def compute(self, moe: LongcatMoE, begun: Begun) -> Begun:
        if begun.shortcut is not None:
            return begun
        experts: Any = moe.experts
        computed = experts.run_moe_core(experts.dispatcher.dispatch_b())
        experts.dispatcher.combine_a(combine_input=computed)
        # What receives low-latency sums reads them too, and the dispatcher does not keep them.
        return begun._replace(pending=(computed.topk_ids, computed.topk_weights))

    def end(self, moe: LongcatMoE, computed: Begun) -> Shortcut:
        if computed.shortcut is not None:
            return computed.shortcut
        assert computed.hidden_states is not None
        assert computed.routing is not None
        routed = moe.experts.dispatcher.combine_b()
        return moe.shortcut(routed, computed.hidden_states, computed.routing)


def is_captured_whole() -> bool:
    """Whether a step is being captured as one graph, which all of its layers are in, or warmed up for that."""
    return get_is_capture_mode() and not is_in_pieces()


def is_in_pieces() -> bool:
    """Whether a step is being captured as a graph in pieces, or run in one."""
    return is_in_breakable_cuda_graph() or is_in_tc_piecewise_cuda_graph()
