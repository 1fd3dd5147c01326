"""A GPU's times, on a device whose every launch takes as long as the test says."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from benchmarks.gpu import timing
from benchmarks.gpu.timing import ClockTimer, GraphTimer

READ_MS, OVERHEAD_MS = 0.08, 0.01
"""Of the tensor that is read before each call, and of a graph's launch."""


class Device:
    """Milliseconds of what is captured, and of what has been replayed; every tenth replay is slower."""

    def __init__(self) -> None:
        self.clock, self.replays, self.captured = 0.0, 0, list[float]()

    def launch(self, ms: float) -> None:
        self.captured.append(ms)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class Graph:
            launches: list[float]

            def replay(self) -> None:
                device.replays += 1
                slow = 3.0 if device.replays % 10 == 0 else 0.0
                device.clock += OVERHEAD_MS + sum(self.launches) + slow

        @contextmanager
        def capture(graph: Graph) -> Iterator[None]:
            device.captured = []
            yield
            graph.launches = device.captured

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.clock

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        for name, stand_in in {"CUDAGraph": Graph, "graph": capture, "Event": Event, "synchronize": list}.items():
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch, "sum", lambda *_, **__: device.launch(READ_MS))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], timing.Timing]:
    device = Device()
    device.install(monkeypatch)
    timer = GraphTimer(1024, torch.device("cpu"))
    return lambda ms: timer(lambda: device.launch(ms))


@pytest.mark.parametrize("us", [0.5, 5.0, 80.0, 1600.0, 40_000.0])
def test_a_call_takes_what_it_adds_to_a_graph(us: float, timed: Any) -> None:
    """Neither the reads before the calls, nor a graph's launch, nor a replay that something delays."""
    found = timed(us / 1e3)
    assert found.us == pytest.approx(us, abs=0.01)
    assert found.us_low <= found.us <= found.us_high


def test_short_calls_are_repeated_in_a_graph_and_long_ones_are_not(timed: Any) -> None:
    assert timed(0.005).calls == 20
    assert timed(40.0).calls == 1
    assert timed(40.0).repetitions == 7


def test_the_spread_is_that_of_the_repetitions() -> None:
    found = timing._summary([10.0, 11.0, 12.0, 13.0, 90.0], 4)
    assert (found.us, found.calls, found.repetitions) == (12.0, 4, 5)
    assert found.us_low == pytest.approx(10.5)
    assert found.us_high == pytest.approx(51.5)


def test_a_clock_measures_the_call() -> None:
    called = []
    assert ClockTimer()(lambda: called.append(1)).us > 0
    assert called == [1]
