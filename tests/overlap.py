"""Stands in for streams while a layer's operations are noted, and finds what is wrong with the order they ran in."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from typing import Any, cast

from torch import Tensor

from longcat_core.parallel.schedule import SHORTCUT_LAYER, Operation, Schedule, Stage, faults

FORK, JOIN = "fork", "join"
MAIN, SIDE = "main", "side"
TRANSPORT = {"dispatch", "combine"}
DENSE = [
    *("dense_ffn_0", "dense_ffn_0_sum"),
    *("attention_1_qkv", "attention_1_core", "attention_1_output", "attention_1_sum", "dense_ffn_1"),
]
SUMS = {name: f"{name}_sum" for name in ("dense_ffn_0", "experts")}
SUMS |= dict.fromkeys(("dense_ffn_1", "identity"), "final_sum")
"""By what was computed last in the stream."""


class Recorder:
    """Stands in for CUDA and for all that a layer calls. It notes operations by stream, forks and joins."""

    def __init__(self) -> None:
        self.noted: list[tuple[str, str]] = []
        self.running = MAIN

    def note(self, name: str, result: Any = None) -> Any:
        self.noted.append((self.running, name))
        return result

    def stream(self, name: str) -> Any:
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.note(FORK),
            wait_event=lambda event: self.note(JOIN),
            record_event=object,
        )

    @contextmanager
    def in_stream(self, stream: Any) -> Iterator[None]:
        self.running = stream.name
        yield
        self.running = MAIN

    def sum(self, rows: Tensor) -> Tensor:
        last = [name for stream, name in self.noted if stream == self.running and name not in (FORK, JOIN)][-1]
        return cast(Tensor, self.note(SUMS[last], rows))


def stages(noted: list[tuple[str, str]]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Between forks and joins: what runs in the first stream, and beside it what runs in the second."""
    found: list[list[tuple[str, str]]] = [[]]
    for stream, name in noted:
        if name in (FORK, JOIN):
            found.append([])
        else:
            found[-1].append((stream, name))
    first, second = ([tuple(name for s, name in stage if s == stream) for stage in found] for stream in (MAIN, SIDE))
    return list(zip(first, second, strict=True))


def problems(noted: list[tuple[str, str]], absent: Collection[str] = TRANSPORT) -> list[str]:
    """Of an order of operations. absent: those that the deployment does not have."""
    if sums := [name for stream, name in noted if stream == SIDE and name.endswith("_sum")]:
        return [f"{name} on the second stream, where sums are made on the first" for name in sums]
    schedule = Schedule("as run", tuple(Stage(str(number), tracks) for number, tracks in enumerate(stages(noted))))
    return list(faults(schedule, _without(SHORTCUT_LAYER, absent)))


def _without(layer: Mapping[str, Operation], absent: Collection[str]) -> dict[str, Operation]:
    """What waits for what is absent waits for what that waits for."""

    def waited_for(name: str) -> tuple[str, ...]:
        return tuple(chain.from_iterable(waited_for(n) if n in absent else (n,) for n in layer[name].after))

    return {name: replace(each, after=waited_for(name)) for name, each in layer.items() if name not in absent}
