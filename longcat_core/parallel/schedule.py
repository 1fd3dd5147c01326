"""The operations of a decoder layer, what each of them waits for, and the orders in which they can run, as data."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum


class Resource(Enum):
    """What an operation is busy with: two that run beside each other should differ in it."""

    COMPUTE = "compute"
    LINK = "link"


@dataclass(frozen=True)
class Operation:
    name: str
    resource: Resource
    after: tuple[str, ...] = ()
    """The operations whose output it reads. One that a deployment does not have (a sum over one rank) is passed by:
    what waits for it waits for what it waits for."""


def _operations(*rows: tuple[str, Resource, tuple[str, ...]]) -> Mapping[str, Operation]:
    return {name: Operation(name, resource, after) for name, resource, after in rows}


_C, _L = Resource.COMPUTE, Resource.LINK

_ATTENTION: tuple[tuple[str, Resource, tuple[str, ...]], ...] = (
    ("attention_0_qkv", _C, ()),
    ("attention_0_core", _C, ("attention_0_qkv",)),
    ("attention_0_output", _C, ("attention_0_core",)),
    ("attention_0_sum", _L, ("attention_0_output",)),
)

SHORTCUT_LAYER = _operations(
    *_ATTENTION,
    ("router", _C, ("attention_0_sum",)),
    ("dispatch", _L, ("router",)),
    ("experts", _C, ("dispatch",)),
    ("identity", _C, ("router",)),
    ("combine", _L, ("experts",)),
    ("dense_ffn_0", _C, ("attention_0_sum",)),
    ("dense_ffn_0_sum", _L, ("dense_ffn_0",)),
    ("attention_1_qkv", _C, ("dense_ffn_0_sum",)),
    ("attention_1_core", _C, ("attention_1_qkv",)),
    ("attention_1_output", _C, ("attention_1_core",)),
    ("attention_1_sum", _L, ("attention_1_output",)),
    ("dense_ffn_1", _C, ("attention_1_sum",)),
    ("final_sum", _L, ("dense_ffn_1", "combine", "identity")),
)
"""LongCat's (ScMoE): the experts read what the first dense FFN reads, and are added at the layer's end. The sums are
those over tensor-parallel ranks; `dispatch` and `combine` are the all-to-all of expert-parallel ranks."""

PLAIN_LAYER = _operations(
    *_ATTENTION,
    ("router", _C, ("attention_0_sum",)),
    ("dispatch", _L, ("router",)),
    ("experts", _C, ("dispatch",)),
    ("combine", _L, ("experts",)),
    ("final_sum", _L, ("combine",)),
)
"""One attention, then experts: DeepSeek-V3, Qwen3-235B."""

DENSE_LAYER = _operations(
    *_ATTENTION,
    ("dense_ffn_0", _C, ("attention_0_sum",)),
    ("dense_ffn_0_sum", _L, ("dense_ffn_0",)),
)
"""An attention, then a dense FFN: the first layers of DeepSeek-V3, and the MTP layer."""


@dataclass(frozen=True)
class Stage:
    """Tracks run beside each other, the operations of a track one after the other; the next stage waits for all."""

    name: str
    tracks: tuple[tuple[str, ...], ...]

    @property
    def operations(self) -> tuple[str, ...]:
        return tuple(name for track in self.tracks for name in track)


@dataclass(frozen=True)
class Schedule:
    name: str
    stages: tuple[Stage, ...]
    batches: int = 1
    """Into which the requests are split; with two, the tracks of a stage belong to different ones."""

    @property
    def operations(self) -> tuple[str, ...]:
        return tuple(name for stage in self.stages for name in stage.operations)


SINGLE_BATCH = Schedule(
    "single-batch",
    (
        Stage(
            "attention",
            (("attention_0_qkv", "attention_0_core", "attention_0_output", "attention_0_sum", "router"),),
        ),
        Stage("dispatch", (("dispatch",), ("dense_ffn_0", "dense_ffn_0_sum", "attention_1_qkv"))),
        Stage("MoE", (("experts", "identity"),)),
        Stage(
            "combine",
            (
                ("combine",),
                ("attention_1_core", "attention_1_output", "attention_1_sum", "dense_ffn_1"),
            ),
        ),
        Stage("sum", (("final_sum",),)),
    ),
)
"""SBO, the report's four stages, and the sum of tensor-parallel ranks, which it does not have."""


def _serial(*stages: tuple[str, tuple[str, ...]]) -> Schedule:
    return Schedule("none", tuple(Stage(name, (operations,)) for name, operations in stages))


SERIAL = _serial(
    ("attention", SINGLE_BATCH.stages[0].operations),
    ("dispatch", ("dispatch",)),
    ("MoE", ("experts", "identity")),
    ("combine", ("combine",)),
    (
        "second half",
        (
            *("dense_ffn_0", "dense_ffn_0_sum"),
            *("attention_1_qkv", "attention_1_core", "attention_1_output", "attention_1_sum"),
            *("dense_ffn_1", "final_sum"),
        ),
    ),
)
"""LongCat's layer in one stream, as stock engines run it."""

_PLAIN_ATTENTION = ("attention_0_qkv", "attention_0_core", "attention_0_output", "attention_0_sum")
PLAIN_SERIAL = _serial(
    ("attention", (*_PLAIN_ATTENTION, "router")),
    ("dispatch", ("dispatch",)),
    ("MoE", ("experts",)),
    ("combine", ("combine", "final_sum")),
)

_DENSE = (
    *("dense_ffn_0", "dense_ffn_0_sum", "attention_1_qkv", "attention_1_core", "attention_1_output"),
    *("attention_1_sum", "dense_ffn_1", "final_sum"),
)
TWO_BATCHES = Schedule(
    "two-batches",
    (
        Stage(
            "one batch's attention and dense FFNs beside the other's experts",
            ((*SINGLE_BATCH.stages[0].operations, *_DENSE), ("dispatch", "experts", "identity", "combine")),
        ),
    ),
    batches=2,
)
PLAIN_TWO_BATCHES = Schedule(
    "two-batches",
    (
        Stage(
            "one batch's attention beside the other's experts",
            ((*_PLAIN_ATTENTION, "router"), ("dispatch", "experts", "combine", "final_sum")),
        ),
    ),
    batches=2,
)
DENSE_SERIAL = _serial(("attention", _PLAIN_ATTENTION), ("dense FFN", ("dense_ffn_0", "dense_ffn_0_sum")))

SCHEDULES: Mapping[str, tuple[Schedule, Schedule | None]] = {
    "none": (SERIAL, PLAIN_SERIAL),
    "two-batches": (TWO_BATCHES, PLAIN_TWO_BATCHES),
    "single-batch": (SINGLE_BATCH, None),
}
"""By what runs beside what: of a shortcut layer, and of a plain one where it can."""


def faults(schedule: Schedule, layer: Mapping[str, Operation]) -> Iterator[str]:
    """Where a schedule leaves an operation out, or runs one before or beside another whose output it reads.

    The tracks of a schedule with two batches are different batches', which take turns: only the order within a track is
    looked at.
    """
    planned = schedule.operations
    for name in sorted(layer.keys() - set(planned)):
        yield f"{name} is left out"
    for name in sorted({name for name in planned if planned.count(name) > 1 or name not in layer}):
        yield f"{name} is there twice, or not of this layer"
    done: set[str] = set()
    for stage in schedule.stages:
        for track in stage.tracks:
            seen = set(done) if schedule.batches == 1 else set(planned) - set(track)
            for name in track:
                for wanted in layer[name].after:
                    if wanted not in seen:
                        yield f"{name} in {stage.name} reads {wanted}, which is not done"
                seen.add(name)
        done |= set(stage.operations)
