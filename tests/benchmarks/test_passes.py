"""What is read out of the notes of forward passes; an engine that is watched is in tests/engines."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from benchmarks.floors import Routed
from benchmarks.passes import WARM_UP, Pass, decode_steps, prefill_seconds, routed_by

STEPS = 3


def passes(*rows: tuple[float, int]) -> list[Pass]:
    """Of seconds since the one before, and tokens."""
    found, now = [], 0.0
    for seconds, tokens in rows:
        now += seconds
        found.append(Pass(now, tokens, 1))
    return found


def test_a_step_is_the_median_time_between_passes_of_all_requests_after_warming_up() -> None:
    prompts = [(0.0, 100), (7.0, 2), (5.0, 101)]  # requests that came first decode while others wait
    warm_up = [(9.0, 2)] * (WARM_UP + 1)
    timed, after = [(1.0, 2), (8.0, 2), (2.0, 2)], [(30.0, 2)] * 5 + [(0.1, 1)] * 20
    seconds, rate, routed = decode_steps(passes(*prompts, *warm_up, *timed, *after), 2, STEPS)
    assert seconds == pytest.approx(2.0)
    assert rate is routed is None


def test_how_quick_memory_was_is_measured_after_the_steps_and_is_no_part_of_them() -> None:
    found = passes((0.0, 100), *[(1.0, 2)] * (WARM_UP + STEPS + 1), (60.0, 2))
    found[-1] = found[-1]._replace(bytes_per_second=2e9)
    seconds, rate, _ = decode_steps(found, 2, STEPS)
    assert seconds == pytest.approx(1.0)
    assert rate == 2e9


def test_what_is_left_out_is_no_part_of_a_step() -> None:
    found = passes((0.0, 100), *[(1.0, 2)] * (WARM_UP + STEPS + 1))
    assert decode_steps([each._replace(left_out=0.25) for each in found], 2, STEPS)[0] == pytest.approx(0.75)


def test_too_few_steps_are_no_measurement() -> None:
    enough = passes((0.0, 100), *[(1.0, 2)] * (WARM_UP + STEPS + 1))
    assert decode_steps(enough, 2, STEPS)[0] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="11 decode steps of 2 requests, wanted 12"):
        decode_steps(enough[:-1], 2, STEPS)
    with pytest.raises(ValueError, match="0 decode steps of 3 requests"):
        decode_steps(enough, 3, STEPS)


def test_what_was_chosen_is_the_mean_over_the_decode_steps_that_counted() -> None:
    found = passes((0.0, 100), *[(1.0, 2)] * (WARM_UP + STEPS + 1))
    found[0] = found[0]._replace(routed=Routed(50, 50))
    found[1] = found[1]._replace(routed=Routed(4, 2))
    found[2] = found[2]._replace(routed=Routed(5, 3))
    assert decode_steps(found, 2, STEPS).routed == Routed(4.5, 2.5)


def test_a_prefill_lasts_until_the_first_decode_step() -> None:
    assert prefill_seconds(passes((3.0, 4096), (2.0, 100), (1.5, 1), (0.5, 1))) == pytest.approx(3.5)


def test_experts_are_counted_once_and_zero_experts_not_at_all() -> None:
    layers = [torch.tensor([[0, 5, -1], [5, -1, -1]]), torch.tensor([[1, 2, 3], [4, 5, 6]])]
    assert routed_by(layers) == Routed(experts=(2 + 6) / 2, choices=(1.5 + 3) / 2)
