"""What a dry run finds out about one rank of a deployment: plain data, as tables and as JSON."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """A deployment, as it would be started."""

    model: str
    """A directory with a `config.json`, or a name that the engine finds."""
    options: tuple[str, ...] = ()
    """The engine's own."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables of the engine's that are set while it is built."""
    rank: int = 0
    """Of all ranks; it is the first of its tensor-parallel group, as nothing is received from others."""
    prompt_tokens: int = 2048
    """In the step of prefill, in all requests together."""
    requests: int = 16
    """How many there are in both steps."""
    is_traced: bool = False
    """Compile two layers instead, and count what is in the graph."""


@dataclass(frozen=True)
class Tensors:
    """Parameters or buffers that differ by numbers in their names only."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    device: str
    bytes: int
    """All of them together."""


@dataclass(frozen=True)
class Memory:
    """Of one GPU, in bytes."""

    total: int
    requested: int
    """The engine's share of it."""
    weights: int
    activations: int
    """The greatest amount beside weights that the engine's profiling step takes."""
    cache: int
    """What is left for the cache; negative where the deployment does not fit."""
    cache_a_token: int
    cache_tokens: int


@dataclass(frozen=True)
class Operation:
    kind: str
    kernel: str
    launches: int
    """In a step."""
    in_layers: tuple[int, ...] = ()
    """Of these, in each decoder layer."""
    beside: tuple[int, ...] = ()
    """Of these, on another stream than the step's."""


@dataclass(frozen=True)
class Step:
    name: str
    tokens: int
    requests: int
    operations: tuple[Operation, ...]
    unordered: tuple[int, ...] = ()
    """Of what a layer launches on another stream than the step's: what may run before its input is there, or after its
    result is read, as streams did not wait for each other within the layer."""

    @property
    def launches(self) -> int:
        return sum(operation.launches for operation in self.operations)

    def by_kind(self) -> dict[str, int]:
        kinds: Counter[str] = Counter()
        for operation in self.operations:
            kinds[operation.kind] += operation.launches
        return dict(kinds.most_common())

    def in_layer(self, layer: int) -> dict[str, int]:
        """Launches by kind in one decoder layer."""
        kinds: Counter[str] = Counter()
        for operation in self.operations:
            kinds[operation.kind] += operation.in_layers[layer] if layer < len(operation.in_layers) else 0
        return dict(kinds.most_common())

    def beside(self, layer: int) -> dict[str, int]:
        """Of these, launches on another stream than the step's."""
        kinds: Counter[str] = Counter()
        for operation in self.operations:
            kinds[operation.kind] += operation.beside[layer] if layer < len(operation.beside) else 0
        return dict((+kinds).most_common())


@dataclass(frozen=True)
class Graph:
    """What torch.compile has made of a model's forward. It was traced as a whole: at a graph break the trace fails."""

    model: str
    pieces: int
    """Between the operators at which the engine splits it."""
    operators: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    request: Request
    engine: str
    machine: str
    refused: str = ""
    """Why the engine would not start, in the words of the plugin or the engine."""
    does_not_fit: str = ""
    failed: str = ""
    """Why the dry run ended early: a fault in the engine, or something that it cannot show."""
    choices: Mapping[str, str] = field(default_factory=dict)
    tensors: tuple[Tensors, ...] = ()
    memory: Memory | None = None
    steps: tuple[Step, ...] = ()
    graphs: tuple[Graph, ...] = ()
    log: tuple[str, ...] = ()
    """Lines of the engine's log that say what was chosen, and its warnings."""

    @property
    def parameter_bytes(self) -> int:
        return sum(tensors.bytes for tensors in self.tensors)


def grouped(tensors: Iterable[tuple[str, Sequence[int], str, str, int]]) -> tuple[Tensors, ...]:
    """tensors: name, shape, dtype, device, bytes. The largest groups first."""
    groups: dict[tuple[str, tuple[int, ...], str, str], list[int]] = {}
    for name, shape, dtype, device, size in tensors:
        groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), tuple(shape), dtype, device), []).append(size)
    rows = [
        Tensors(name, len(sizes), shape, dtype, device, sum(sizes))
        for (name, shape, dtype, device), sizes in groups.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def write(reports: Sequence[Report], path: Path) -> None:
    path.write_text(json.dumps([asdict(report) for report in reports], indent=1))


def request_of(raw: Mapping[str, Any]) -> Request:
    """From JSON."""
    pairs = tuple((name, value) for name, value in raw["environment"])
    return Request(**{**raw, "options": tuple(raw["options"]), "environment": pairs})


def read(path: Path) -> list[Report]:
    return [_report(raw) for raw in json.loads(path.read_text())]


def _report(raw: dict[str, Any]) -> Report:
    steps = tuple(
        Step(
            **{
                **step,
                "operations": tuple(
                    Operation(**{**operation, **{name: tuple(operation[name]) for name in ("in_layers", "beside")}})
                    for operation in step["operations"]
                ),
                "unordered": tuple(step["unordered"]),
            }
        )
        for step in raw["steps"]
    )
    return Report(
        **{
            **raw,
            "request": request_of(raw["request"]),
            "tensors": tuple(Tensors(**{**row, "shape": tuple(row["shape"])}) for row in raw["tensors"]),
            "memory": Memory(**raw["memory"]) if raw["memory"] is not None else None,
            "steps": steps,
            "graphs": tuple(Graph(**graph) for graph in raw["graphs"]),
            "log": tuple(raw["log"]),
        }
    )
