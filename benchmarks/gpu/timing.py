"""How long a call takes on the device, with its inputs in memory and not in L2: medians, and their spread."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

_GRAPH_MS = 3.0
"""About as long as the calls of one graph take."""
_MEASURED_MS = 60.0
"""About as long as all replays of a call's graph take."""
_WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    us: float
    """The median of all repetitions."""
    us_low: float
    """The first quartile."""
    us_high: float
    """The third."""
    calls: int
    """Of a repetition, which has their mean."""
    repetitions: int


class Timer(Protocol):
    def __call__(self, call: Callable[[], object]) -> Timing: ...


class GraphTimer:
    """On an NVIDIA GPU: a CUDA graph of some calls, against a graph without them.

    Before each call a tensor greater than L2 is read. It is read, as lines that were written would have to be written
    back while the call runs. Both graphs have the reads, and their difference is the calls'.
    """

    def __init__(self, read_bytes: int, device: torch.device) -> None:
        self._read = torch.zeros(read_bytes // 4, dtype=torch.float32, device=device)
        self._sum = torch.empty((), dtype=torch.float32, device=device)
        self._without = cache(self._graph_without)

    def __call__(self, call: Callable[[], object]) -> Timing:
        for _ in range(_WARM_UP):
            call()
        one = self._graph(call, 1)
        both = max(self._ms(one) for _ in range(2))
        alone = max(1e-3, both - self._ms(self._without(1)))
        calls = min(20, max(1, round(_GRAPH_MS / alone)))
        repetitions = min(25, max(7, round(_MEASURED_MS / (calls * both))))
        graph = self._graph(call, calls)
        differences = []
        for _ in range(repetitions):
            differences.append(1e3 * (self._ms(graph) - self._ms(self._without(calls))) / calls)
        return _summary(differences, calls)

    def _graph(self, call: Callable[[], object] | None, calls: int) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                torch.sum(self._read, dim=0, out=self._sum)
                if call is not None:
                    call()
        graph.replay()
        return graph

    def _graph_without(self, calls: int) -> torch.cuda.CUDAGraph:
        return self._graph(None, calls)

    def _ms(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


class ClockTimer:
    """Where there is no GPU: the clock on the wall, to see that the code runs. Nobody should quote it."""

    def __call__(self, call: Callable[[], object]) -> Timing:
        started = time.perf_counter()
        call()
        return _summary([1e6 * (time.perf_counter() - started)], 1)


def timer(device: torch.device, read_bytes: int) -> Timer:
    return GraphTimer(read_bytes, device) if device.type == "cuda" else ClockTimer()


def _summary(us: list[float], calls: int) -> Timing:
    low, middle, high = statistics.quantiles(us, n=4) if len(us) > 1 else us * 3
    return Timing(round(middle, 3), round(low, 3), round(high, 3), calls, len(us))
