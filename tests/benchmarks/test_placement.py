"""The simulation of placement: rows by hand, its bounds, and that ours leaves no rank busier than the engine's."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import numpy as np
import pytest
from numpy.random import default_rng

from benchmarks.bench_placement import ENGINES, busiest, by_chance, in_hindsight, measure, of_step, policies
from benchmarks.drawn_routing import EXPERTS, TOP_K, Topics, Zipf, read_nano
from longcat_core.parallel.placement import Placement, linear


@pytest.mark.parametrize("kind", [Zipf, Topics])
def test_a_third_of_the_drawn_choices_are_zero_experts(kind: type[Zipf] | type[Topics]) -> None:
    ids = next(kind(0.0, default_rng(0)).steps(0, 1, 4096, default_rng(1)))
    assert ids.shape == (4096, TOP_K)
    assert (ids < 0).mean() == pytest.approx(1 / 3, abs=0.03)
    of_a_token = (ids >= 0).sum(axis=1)
    assert of_a_token.min() <= 2
    assert of_a_token.max() == TOP_K
    assert all(len(set(token[token >= 0])) == (token >= 0).sum() for token in ids[:64])
    assert ids.max() < EXPERTS


def test_nano_reads_other_files_in_each_window() -> None:
    first, second = read_nano(windows=2, tokens=16)
    assert first.experts == second.experts == 32
    steps = [next(layer.steps(window, 1, 512, default_rng(0))) for layer in (first, second) for window in (0, 1)]
    for ids in steps:
        assert ids.shape == (512, 6)
        assert 0.1 < (ids < 0).mean() < 0.6
    assert not (steps[0] == steps[1]).all()
    assert not (steps[0] == steps[2]).all()


def test_rows_go_to_a_replica_by_the_hash_of_their_token() -> None:
    """Expert 0 is on both ranks: its rows of tokens 0 and 2 are on the first, as the hash is even, token 1's is not."""
    steps = [of_step(np.array([[0, 1], [0, -1], [0, -1]]))]
    assert busiest(Placement(np.array([[[0, 1], [0, -1]]])), steps, 2) == [3 / 2]
    assert busiest(Placement(np.array([[[0, -1], [1, 0]]])), steps, 2) == [1]


def test_no_placement_has_less_than_in_hindsight() -> None:
    rows = np.array([600.0, 100, 100, 100, 100])
    assert in_hindsight(rows, 5, 0) == pytest.approx(3)
    assert in_hindsight(rows, 5, 1) == pytest.approx(1.5, rel=2e-3)
    assert in_hindsight(rows, 5, 2) == pytest.approx(1, rel=2e-3)


def test_ranks_that_are_alike_have_an_imbalance_by_chance() -> None:
    steps = [of_step(np.zeros((12288, 8), dtype=int))] * 50
    assert np.mean(by_chance(steps, 128, 0)) == pytest.approx(1.095, abs=0.005)


@pytest.mark.parametrize(
    ("kind", "drift", "ranks", "redundant"), [(Zipf, 0.0, 16, 16), (Topics, 0.0, 32, 0), (Topics, 0.2, 32, 32)]
)
def test_ours_leaves_no_rank_busier_than_the_engine_does(
    kind: type[Zipf] | type[Topics], drift: float, ranks: int, redundant: int
) -> None:
    layer = kind(drift, default_rng(5))
    rows = {row["policy"]: row for row in measure("drawn", [layer], ranks, [redundant])}
    assert len(policies().keys() & set(ENGINES)) in (1, 2), "of the engine that is installed"
    for engine in policies().keys() & set(ENGINES):
        for ours in ("ours", "ours, 1/16"):
            assert rows[ours]["mean"] <= rows[engine]["mean"] + 0.004, "the 0.004 are chance"
        assert rows["ours"]["experts received a layer"] < 0.6 * rows[engine]["experts received a layer"]
    assert rows["ours, 1/16"]["experts received a layer"] <= EXPERTS / 16
    assert rows["hindsight"]["mean"] < rows["ours"]["mean"] < rows["linear"]["mean"]


def test_linear_is_what_an_engine_begins_with() -> None:
    rows = np.ones((2, 1, 8))
    assert (policies()["linear"](rows, 4, 4, None).experts == linear(1, 8, 4, 4).experts).all()
