"""The target between two bounds, in simulated queues: it falls, rises, and does not move to and fro."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import groupby, pairwise

import pytest

from longcat_core.target_by_queue import PATIENCE, PLACES, TargetByQueue

BOUNDS, FULL = (5.0, 8.0), 64
ALL_PLACES = PLACES * PATIENCE
"""Forward passes from the one bound to the other."""


def targets(queue: Iterable[int], by_queue: TargetByQueue | None = None) -> list[float]:
    """Of each forward pass."""
    by_queue = by_queue or TargetByQueue(BOUNDS)
    return [by_queue.next(waiting, FULL) for waiting in queue]


def at(waiting: int) -> TargetByQueue:
    """Where it is after so many have waited for long."""
    by_queue = TargetByQueue(BOUNDS)
    targets([waiting] * 2 * ALL_PLACES, by_queue)
    return by_queue


@pytest.mark.parametrize("bounds", [(5.0, 8.0), (8.0, 5.0)])
def test_the_greater_is_the_target_while_nothing_waits(bounds: tuple[float, float]) -> None:
    by_queue = TargetByQueue(bounds)
    assert by_queue.bounds == (5, 8)
    assert set(targets([0] * 100, by_queue)) == {8}


@pytest.mark.parametrize("waiting", [FULL, 10 * FULL])
def test_it_falls_to_the_lesser_as_the_queue_is_full_and_rises_again(waiting: int) -> None:
    by_queue = TargetByQueue(BOUNDS)
    falling = targets([waiting] * ALL_PLACES, by_queue)
    assert all(after <= before for before, after in pairwise(falling))
    assert falling[-1] == 5
    assert len(set(falling)) == PLACES + 1, "in small steps"
    assert min(len(list(passes)) for _, passes in groupby(falling[:-1])) >= PATIENCE - 1
    rising = targets([0] * ALL_PLACES, by_queue)
    assert all(after >= before for before, after in pairwise(rising))
    assert rising[-1] == 8


def test_half_a_queue_asks_for_half_the_way() -> None:
    assert at(FULL // 2).target == 6.5


@pytest.mark.parametrize("place", range(PLACES + 1))
def test_a_queue_that_comes_and_goes_around_a_place_moves_nothing(place: int) -> None:
    generator, waiting = random.Random(0), FULL * place // PLACES
    by_queue = at(waiting)
    most = FULL // PLACES - 1
    noise = [max(0, waiting + generator.randint(-most, most)) for _ in range(1000)]
    assert set(targets(noise, by_queue)) == {by_queue.target}


@pytest.mark.parametrize("passes", [1, PATIENCE - 1])
def test_a_queue_that_is_full_for_less_than_a_place_moves_nothing(passes: int) -> None:
    assert set(targets(([FULL] * passes + [0]) * 100)) == {8}


def test_ranks_that_are_told_the_same_have_the_same_target() -> None:
    generator = random.Random(1)
    queue = [generator.randint(0, 2 * FULL) for _ in range(500)]
    assert targets(queue) == targets(queue)
