"""A layer's experts beside its dense path in vLLM, on streams, graphs and scratch memory of the null GPU."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture
from vllm.config import CUDAGraphMode
from vllm.v1.worker import workspace

from longcat_vllm.devices.cuda.overlap import LANE, second_stream
from tests.overlap import DENSE, FORK, JOIN, MAIN, SIDE
from tests.vllm.noted_layer import LaneRecorder, a_layer, all_problems


class StreamRecorder(LaneRecorder):
    """Of the streams that PyTorch has, and the memory that vLLM's workspace gives."""

    def note(self, name: str, result: Any = None) -> Any:
        self.running = SIDE if torch.cuda.current_stream() == second_stream() else MAIN
        return super().note(name, result)

    def lane(self) -> int:
        (memory,) = workspace.current_workspace_manager().get_simultaneous(((1 << 20,), torch.uint8))
        return memory.data_ptr()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> StreamRecorder:
    recorder, wait_event = StreamRecorder(), torch.cuda.Stream.wait_event

    def wait_for_stream(stream: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
        recorder.note(FORK)
        wait_event(stream, other.record_event())

    def wait_for_event(stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        recorder.note(JOIN)
        wait_event(stream, event)

    monkeypatch.setattr(torch.cuda.Stream, "wait_stream", wait_for_stream)
    monkeypatch.setattr(torch.cuda.Stream, "wait_event", wait_for_event)
    monkeypatch.setattr(workspace, "_manager", None)
    workspace.init_workspace_manager(torch.device("cuda:0"), num_lanes=LANE + 1)
    return recorder


def a_whole_graph() -> AbstractContextManager[None]:
    return torch.cuda.graph(torch.cuda.CUDAGraph())


@contextmanager
def a_breakable_graph() -> Iterator[None]:
    with torch.cuda.stream(torch.cuda.Stream()), BreakableCUDAGraphCapture():
        yield


def run(
    recorder: StreamRecorder,
    mode: CUDAGraphMode,
    captured: Callable[[], AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> list[tuple[str, str]]:
    rows = torch.ones(3, 4, device="cuda")
    layer = a_layer(recorder, mode, monkeypatch)
    recorder.lane()
    with torch.inference_mode(), captured():
        recorder.noted.clear()
        layer(rows, rows, rows, rows)
        return recorder.noted.copy()


@pytest.mark.parametrize(
    ("mode", "captured"),
    [
        (CUDAGraphMode.NONE, nullcontext),
        (CUDAGraphMode.NONE, a_whole_graph),  # as the second model runner does
        (CUDAGraphMode.FULL, a_whole_graph),
    ],
)
def test_a_whole_step_has_a_second_stream_with_memory_of_its_own(
    mode: CUDAGraphMode, captured: Any, recorder: StreamRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = run(recorder, mode, captured, monkeypatch)
    assert all_problems(recorder) == []
    names = [name for _, name in noted]
    beside = noted[names.index(FORK) + 1 : names.index(JOIN)]
    assert [name for stream, name in beside if stream == SIDE] == ["experts"]
    assert [name for stream, name in beside if stream == MAIN] == DENSE


@pytest.mark.parametrize(
    ("mode", "captured"),
    [
        (CUDAGraphMode.PIECEWISE, nullcontext),
        (CUDAGraphMode.PIECEWISE, a_whole_graph),  # of a piece
        (CUDAGraphMode.PIECEWISE, a_breakable_graph),
        (CUDAGraphMode.FULL, a_breakable_graph),
    ],
)
def test_a_graph_in_pieces_has_one_stream(
    mode: CUDAGraphMode, captured: Any, recorder: StreamRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = run(recorder, mode, captured, monkeypatch)
    assert all_problems(recorder) == []
    assert {stream for stream, _ in noted} == {MAIN}
    assert not {FORK, JOIN} & {name for _, name in noted}


def test_without_our_worker_there_is_no_lane_for_the_branch(
    recorder: StreamRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error rather than memory that two streams write to."""
    monkeypatch.setattr(workspace, "_manager", None)
    workspace.init_workspace_manager(torch.device("cuda:0"))
    with pytest.raises(RuntimeError, match=f"lane {LANE} is not configured"):
        run(recorder, CUDAGraphMode.NONE, nullcontext, monkeypatch)
