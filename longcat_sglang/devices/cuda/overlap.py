"""A layer's MoE on a stream of its own, beside the dense path."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.context import is_in_breakable_cuda_graph
from sglang.srt.model_executor.runner_backend_utils.tc_piecewise_cuda_graph.context_manager import (
    is_in_tc_piecewise_cuda_graph,
)
from sglang.srt.model_executor.runner_utils.capture_mode import get_is_capture_mode
from torch import Tensor

from longcat_core.layers.experts import Shortcut
from longcat_sglang.devices.branch import Begun, Branch


class SecondStream(Branch):
    """In the graph of a whole step, as SGLang's own layers do; else all of it before anything else.

    A graph in pieces has to fork and join within one piece, and attention is between two. Outside of graphs a step's
    kernels are launched no faster than they run, unless it has many tokens, which leave no room beside them.

    The allocator gives a stream's memory to that stream again. What the MoE makes is freed after the join, and what it
    reads is kept until then by `Begun`.
    """

    def __init__(self, stream: Any) -> None:
        """stream: a `torch.cuda.Stream`, made before any graph is captured."""
        self._stream = stream

    def begin(self, moe: Callable[[Tensor], Shortcut], hidden_states: Tensor) -> Begun:
        if not is_captured_whole():
            return Begun(moe(hidden_states))
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            shortcut = moe(hidden_states)
            return Begun(shortcut, self._stream.record_event(), hidden_states)

    def end(self, begun: Begun) -> Shortcut:
        if begun.done is not None:
            torch.cuda.current_stream().wait_event(begun.done)
        return begun.shortcut


def is_captured_whole() -> bool:
    """Whether a step is being captured as one graph, which all of its layers are in, or warmed up for that."""
    return get_is_capture_mode() and not (is_in_breakable_cuda_graph() or is_in_tc_piecewise_cuda_graph())
