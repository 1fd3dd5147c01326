"""The layer as operations and stages: every schedule has each operation once, after all that it reads."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import replace

import pytest

from longcat_core.parallel.schedule import (
    DENSE_LAYER,
    DENSE_SERIAL,
    PLAIN_LAYER,
    PLAIN_SERIAL,
    PLAIN_TWO_BATCHES,
    SCHEDULES,
    SERIAL,
    SHORTCUT_LAYER,
    SINGLE_BATCH,
    TWO_BATCHES,
    Operation,
    Resource,
    Schedule,
    Stage,
    faults,
)


@pytest.mark.parametrize(
    ("schedule", "layer"),
    [
        (SERIAL, SHORTCUT_LAYER),
        (SINGLE_BATCH, SHORTCUT_LAYER),
        (TWO_BATCHES, SHORTCUT_LAYER),
        (PLAIN_SERIAL, PLAIN_LAYER),
        (PLAIN_TWO_BATCHES, PLAIN_LAYER),
        (DENSE_SERIAL, DENSE_LAYER),
    ],
)
def test_a_schedule_has_every_operation_once_after_what_it_reads(
    schedule: Schedule, layer: dict[str, Operation]
) -> None:
    assert list(faults(schedule, layer)) == []


def test_single_batch_overlap_has_the_four_stages_of_the_report() -> None:
    names = [stage.name for stage in SINGLE_BATCH.stages]
    assert names == ["attention", "dispatch", "MoE", "combine", "sum"]
    for stage in (SINGLE_BATCH.stages[1], SINGLE_BATCH.stages[3]):
        link, compute = stage.tracks
        assert {SHORTCUT_LAYER[name].resource for name in link} == {Resource.LINK}
        assert Resource.COMPUTE in {SHORTCUT_LAYER[name].resource for name in compute}


def test_only_a_shortcut_can_be_overlapped_within_a_batch() -> None:
    shortcut, plain = SCHEDULES["single-batch"]
    assert shortcut is SINGLE_BATCH
    assert plain is None
    stage = Stage("combine", (("combine",), ("attention_1_core",)))
    assert any("attention_1_core" in fault for fault in faults(Schedule("x", (stage,)), PLAIN_LAYER))


def test_an_operation_beside_one_that_it_reads_is_a_fault() -> None:
    first, second, *rest = SINGLE_BATCH.stages
    wrong = Stage("dispatch", (("dispatch",), (*second.tracks[1], "experts")))
    stages = (first, wrong, replace(rest[0], tracks=(("identity",),)), *rest[1:])
    assert list(faults(replace(SINGLE_BATCH, stages=stages), SHORTCUT_LAYER)) == [
        "experts in dispatch reads dispatch, which is not done"
    ]


def test_a_track_of_one_of_two_batches_has_an_order_too() -> None:
    (stage,) = TWO_BATCHES.stages
    turned = replace(stage, tracks=(stage.tracks[0], tuple(reversed(stage.tracks[1]))))
    assert len(list(faults(replace(TWO_BATCHES, stages=(turned,)), SHORTCUT_LAYER))) == 2


def test_what_is_left_out_or_twice_is_a_fault() -> None:
    found = list(faults(replace(SERIAL, stages=(*SERIAL.stages[:-1], SERIAL.stages[0])), SHORTCUT_LAYER))
    assert "final_sum is left out" in found
    assert "router is there twice, or not of this layer" in found
