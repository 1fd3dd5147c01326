"""Stands in for DeepEP's kernels under SGLang's dispatcher: one rank, whose rows are NaN until they are waited for."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.batch_overlap.two_batch_overlap import MaybeTboDeepEPDispatcher
from sglang.srt.layers.moe.token_dispatcher import StandardDispatchOutput, deepep
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import DeepEPMode, DispatcherOutputDtype
from torch import Tensor

from tests.overlap import FORK, JOIN, SIDE, Recorder


class Buffer:
    """In place of `deep_ep.Buffer`. The normal kernels do not copy what is on its way."""

    group_size = 1

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._captured: Any = None

    def capture(self) -> Any:
        self._recorder.note(FORK)
        self._captured = object()
        return self._captured

    def get_dispatch_layout(self, topk_ids: Tensor, num_experts: int, *, previous_event: Any, **_: Any) -> Any:
        return None, None, None, None, previous_event

    def dispatch(self, rows: Tensor, *, topk_idx: Tensor, topk_weights: Tensor, previous_event: Any, **_: Any) -> Any:
        sent, event = self._launched("dispatch", rows, previous_event)
        return sent, topk_idx, topk_weights, [], "handle", event

    def combine(self, rows: Tensor, handle: str, *, previous_event: Any, **_: Any) -> Any:
        assert handle == "handle"
        sent, event = self._launched("combine", rows, previous_event)
        return sent, None, event

    def low_latency_dispatch(self, rows: Tensor, topk_idx: Tensor, *_: Any, return_recv_hook: bool, **__: Any) -> Any:
        sent, hook = self._sent("dispatch", rows, [])
        return sent, None, "handle", None, hook

    def low_latency_combine(
        self, *, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: str, return_recv_hook: bool, **_: Any
    ) -> Any:
        assert handle == "handle"
        sent, hook = self._sent("combine", x, [topk_idx, topk_weights])
        return sent, None, hook

    def _launched(self, name: str, rows: Tensor, after: Any) -> tuple[Tensor, Any]:
        """By the normal kernels: on a stream that waits for what was captured, and for nothing later."""
        assert after is self._captured, "it waits for more than its input"
        arrived = self._on_link(name, rows)

        def wait() -> None:
            arrived.copy_(rows)
            self._recorder.note(JOIN)

        return arrived, SimpleNamespace(current_stream_wait=wait)

    def _sent(self, name: str, rows: Tensor, read_again: list[Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """By the low-latency kernels: read at once; `read_again` is read by what receives."""
        self._recorder.note(FORK)
        arrived, sent = self._on_link(name, rows), rows.clone()
        alive = [weakref.ref(each) for each in read_again]

        def receive() -> None:
            assert all(each() is not None for each in alive), "its memory may be another's"
            arrived.copy_(sent)
            self._recorder.note(JOIN)

        return arrived, receive

    def _on_link(self, name: str, rows: Tensor) -> Tensor:
        with self._recorder.in_stream(self._recorder.stream(SIDE)):
            arrived: Tensor = self._recorder.note(name, torch.full_like(rows, torch.nan))
        return arrived


def install(recorder: Recorder, patch: pytest.MonkeyPatch) -> None:
    """Have SGLang's dispatchers that are made now call a `Buffer`."""
    buffer = Buffer(recorder)
    modes = dict.fromkeys(("set_dispatch_mode_as_normal", "set_dispatch_mode_as_low_latency"), lambda: None)
    configs = SimpleNamespace(normal_dispatch_config=None, normal_combine_config=None)
    replaced = {
        "use_deepep": True,
        "Buffer": buffer,
        "DeepEPBuffer": SimpleNamespace(get_deepep_buffer=lambda *_: buffer, **modes),
        "DeepEPConfig": SimpleNamespace(get_instance=lambda: configs),
        "deep_gemm_wrapper": SimpleNamespace(ENABLE_JIT_DEEPGEMM=True, DEEPGEMM_BLACKWELL=False),
        "get_deepep_output_dtype": lambda _: DispatcherOutputDtype.BF16,
    }
    for name, value in replaced.items():
        patch.setattr(deepep, name, value, raising=False)


def dispatcher(mode: DeepEPMode) -> Any:
    """As SGLang makes it for a layer (`create_moe_dispatcher`)."""
    outer: Any = object.__new__(MaybeTboDeepEPDispatcher)
    unused: Any = None
    outer._inners = [
        deepep.DeepEPDispatcher(
            group=unused,
            router_topk=2,
            permute_fusion=True,
            num_experts=4,
            num_local_experts=4,
            hidden_size=4,
            params_dtype=torch.float32,
            deepep_mode=mode,
            async_finish=True,
            return_recv_hook=True,
        )
    ]
    return outer


def computing(core: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """core: `run_moe_core` behind SGLang's standard dispatcher. Returns one behind DeepEP's."""

    def run_moe_core(dispatched: Any) -> Any:
        logits: Any = None
        chosen = StandardTopKOutput(dispatched.topk_weights, dispatched.topk_ids.to(torch.int32), logits)
        sums = core(StandardDispatchOutput(dispatched.hidden_states, None, chosen)).hidden_states
        is_normal = dispatched.format.is_deepep_normal()
        kind = deepep.DeepEPNormalCombineInput if is_normal else deepep.DeepEPLLCombineInput
        return kind(sums, dispatched.topk_ids, dispatched.topk_weights)

    return run_moe_core
