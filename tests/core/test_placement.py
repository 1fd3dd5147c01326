"""Placement of experts: what each rank holds, in cases worked by hand, in small ones, and from a current placement."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from longcat_core.parallel.placement import (
    Floats,
    Placement,
    _common_changes,
    counted_rows,
    linear,
    place,
    place_while_serving,
    step_rows,
)


def drawn(seed: int, steps: int = 32, layers: int = 2, experts: int = 32) -> Floats:
    """Rows of skewed experts, half of which are busier in some steps, the other half in the others."""
    generator = np.random.default_rng(seed)
    mean = 400 * generator.pareto(1.5, (layers, experts)).clip(0.05, 20)
    together = generator.choice([-1, 1], (layers, experts)) * generator.normal(size=(steps, 1, 1)).clip(-2, 2)
    return generator.poisson(mean * (1 + 0.4 * together)).astype(float)


def busiest(placement: Placement, rows: Floats) -> float:
    """Of each layer's ranks over the mean, mean over steps and layers."""
    ranks = placement.rank_rows(rows)
    return float((ranks.max(axis=-1) / ranks.mean(axis=-1)).mean())


def has_one_twice(placement: Placement) -> bool:
    ranks = placement.experts.reshape(-1, placement.experts.shape[-1])
    return any(len(set(held)) < len(held) for held in (rank[rank >= 0].tolist() for rank in ranks))


def test_rows_are_those_of_ffn_experts() -> None:
    """Two steps of top 3; -1 is a zero expert, and so is 4 of four FFN experts."""
    steps = [np.array([[0, -1, 3], [3, 4, -1]]), np.array([[1, 2, 5]])]
    assert step_rows(steps, 4).tolist() == [[1, 0, 0, 2], [0, 1, 1, 0]]


def test_a_swap_finds_what_the_greedy_packing_does_not() -> None:
    """Greedily: 2900 + 1800 + 1500 against 2200 + 1900 + 1600. The best: 2900 + 1600 + 1500 against the others."""
    rows = np.array([[[2900.0, 2200, 1900, 1800, 1600, 1500]]])
    assert sorted(place(rows, 2).rank_rows(rows[0])[0]) == [5900, 6000]


@pytest.mark.parametrize("seed", range(40))
def test_where_all_placements_can_be_tried_none_is_much_better(seed: int) -> None:
    rows = np.random.default_rng(seed).integers(1, 30, 8) * 100.0
    best = min(max(rows[list(some)].sum(), rows.sum() - rows[list(some)].sum()) for some in combinations(range(8), 4))
    found = place(rows[None, None], 2).rank_rows(rows[None]).max()
    assert found <= 1.03 * best


def test_the_expert_with_most_rows_gets_the_replicas() -> None:
    rows = np.array([[[900.0, 100, 100, 100]]])
    placement = place(rows, 3, redundant=2)
    assert placement.replicas(4).tolist() == [[3, 1, 1, 1]]
    assert placement.rank_rows(rows[0]).tolist() == [[400, 400, 400]]


def test_experts_that_are_busy_together_are_apart() -> None:
    """The means of all four are alike, so that only steps show which two should share a rank."""
    pattern = np.array([[1600, 400, 1600, 400], [400, 1600, 400, 1600]])
    rows = np.tile(pattern, (8, 1))[:, None].astype(float)
    assert busiest(place(rows.mean(axis=0, keepdims=True), 2), rows) == 1.6
    assert busiest(place(rows, 2), rows) == 1


def test_chance_alone_is_no_reason_to_part_experts() -> None:
    rows = np.random.default_rng(0).poisson(200, (24, 1, 64)).astype(float)
    assert (place(rows, 16).experts == place(rows.mean(axis=0, keepdims=True), 16).experts).all()


def test_rows_that_each_of_eight_ranks_has_counted_are_no_more_than_chance() -> None:
    rows = np.random.default_rng(0).poisson(200, (24, 1, 64)).astype(float)
    assert (counted_rows(8 * rows) == rows).all()
    assert (place(8 * rows, 16).experts != place(rows, 16).experts).any()
    assert (place_while_serving(8 * rows[:, 0], 16, 0) == place(rows, 16).physical_to_logical[0]).all()


@pytest.mark.parametrize("counts", [[], [[[0.5, 4.0]]], [[[3.0, 4.0]], [[0.0, 2.0]]]])
def test_counts_without_a_common_divisor_stay_as_they_are(counts: list[list[list[float]]]) -> None:
    assert counted_rows(np.array([*counts, [[0.0, 0.0]]])).tolist() == counts


def test_common_changes_of_many_steps_are_those_of_all_products() -> None:
    """With more steps than experts they are found in another way."""
    rows = drawn(0, steps=100, layers=1)[:, 0]
    chance = np.sqrt(rows.mean(axis=0))
    _, values, directions = np.linalg.svd((rows - rows.mean(axis=0)) / chance, full_matrices=False)
    noise = 32 / 99
    variances = np.where(values**2 / 99 > 1.05 * (1 + noise**0.5) ** 2, values**2 / 99 - 1 - noise, 0)
    found, wanted = _common_changes(rows), directions.T * np.sqrt(variances) * chance[:, None]
    assert found.shape[1] == 1
    np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, rtol=1e-9, atol=1e-9)


def test_steps_of_which_nothing_was_counted_say_nothing() -> None:
    rows = drawn(0, layers=1)[:, 0]
    with_empty = np.concatenate([rows, np.zeros((32, 32))])
    assert (place_while_serving(with_empty, 4, 4) == place_while_serving(rows, 4, 4)).all()


def test_experts_stay_where_nothing_was_counted_or_all_are_alike() -> None:
    current = place(drawn(0, layers=1), 4, 4).physical_to_logical[0]
    assert (place_while_serving(np.zeros((3, 32)), 4, 4, current=current) == current).all()
    assert (place_while_serving(np.zeros((3, 32)), 4, 4) == [*range(32), *range(4)]).all()
    swapped = linear(1, 32, 4).physical_to_logical[0][::-1].copy()
    assert (place_while_serving(np.full((3, 32), 100.0), 4, 0, current=swapped) == swapped).all()


@pytest.mark.parametrize(
    ("ranks", "redundant", "a_node"),
    [(4, 0, None), (4, 4, 2), (8, 16, 4), (8, 5, 4), (32, 0, 8), (32, 64, 8), (20, 8, None), (1, 0, None), (2, 32, 1)],
)
@pytest.mark.parametrize("seed", range(6))
def test_every_expert_is_there_and_no_rank_has_one_twice(
    ranks: int, redundant: int, a_node: int | None, seed: int
) -> None:
    rows = drawn(seed) if seed else np.ones((1, 2, 32))
    placement = place(rows, ranks, redundant, ranks_a_node=a_node)
    assert placement.experts.shape == (2, ranks, -(-(32 + redundant) // ranks))
    assert (placement.experts >= 0).sum(axis=(1, 2)).tolist() == [32 + redundant] * 2
    replicas = placement.replicas(32)
    assert replicas.min() == 1 or redundant >= 32
    assert not has_one_twice(placement)


@pytest.mark.parametrize("redundant", [0, 1, 5, 11, 12, 13, 20, 21])
def test_no_rank_has_an_expert_twice_where_it_is_tight(redundant: int) -> None:
    for seed in range(10):
        before, now = (place(drawn(each, 1, 1, 7), 4, redundant) for each in (seed, seed + 50))
        after = place(drawn(seed + 50, 1, 1, 7), 4, redundant, current=before)
        for placement in (now, after):
            assert placement.replicas(7).sum() == 7 + redundant
            assert not has_one_twice(placement)


def test_replicas_are_on_different_nodes() -> None:
    placement = place(drawn(1), 8, 16, ranks_a_node=2)
    of_nodes = placement.experts.reshape(2, 4, -1)
    for layer, replicas in zip(of_nodes, placement.replicas(32), strict=True):
        on_node = np.stack([np.bincount(node, minlength=32) for node in layer])
        assert (on_node.max(axis=0) <= -(-replicas // 4)).all()
    assert placement.replicas(32).max() > 2


def test_ranks_are_evened_beside_one_that_cannot_be() -> None:
    """The first expert alone has more than a rank's share; the others do not stay as they were given out."""
    rows = np.array([[[9000.0, 1, 3000, 2900, 100, 200, 1500, 1400]]])
    after = place(rows, 4, current=linear(1, 8, 4)).rank_rows(rows[0])[0]
    assert sorted(after) == [2900, 3100, 3100, 9001]


def test_redundant_experts_stay_where_they_bring_little() -> None:
    """The second has most rows now, but hardly more than the first."""
    before = place(np.array([[[1000.0, 900, 100, 100]]]), 2, 1)
    now = np.array([[[980.0, 1000, 100, 100]]])
    assert place(now, 2, 1, current=before).received(before).tolist() == [0]


def test_a_placement_that_is_even_stays() -> None:
    rows = np.random.default_rng(0).poisson(1000 / np.arange(1, 33) ** 0.5, (16, 2, 32)).astype(float)
    placement = place(rows, 8, 8)
    again = place(rows, 8, 8, current=placement)
    assert again.received(placement).tolist() == [0, 0]


def test_an_expert_that_is_twice_on_a_rank_is_parted() -> None:
    current = Placement(np.array([[[0, 0, 1], [2, 3, 0]]]))
    after = place(np.full((1, 1, 4), 100.0), 2, 2, current=current, most_received=0)
    assert not has_one_twice(after)
    assert after.replicas(4).sum() == 6


@pytest.mark.parametrize("most", [0, 1, 2, 5, 12])
def test_no_more_experts_are_sent_than_allowed(most: int) -> None:
    before = place(drawn(3), 8, 8)
    rows = drawn(4)
    after = place(rows, 8, 8, current=before, most_received=most)
    assert after.received(before).max() <= most
    assert (after.replicas(32) > 0).all()
    assert busiest(after, rows) <= busiest(before, rows)
    if most == 12:
        assert busiest(after, rows) < 0.8 * busiest(before, rows)
        assert after.received(before).min() > 2


def test_an_expert_that_stays_on_its_rank_is_not_sent() -> None:
    before = Placement(np.array([[[0, 1], [2, -1]]]))
    assert Placement(np.array([[[1, 0], [-1, 2]]])).received(before).tolist() == [0]
    assert Placement(np.array([[[0, 2], [1, -1]]])).received(before).tolist() == [2]


def test_linear_is_the_order_in_which_engines_begin() -> None:
    assert linear(1, 4, 2, redundant=2).physical_to_logical.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert linear(1, 3, 2).experts.tolist() == [[[0, 1], [2, -1]]]


def test_what_does_not_fit_is_refused() -> None:
    rows = drawn(0)
    with pytest.raises(ValueError, match="97 redundant experts, wanted 0 to 96"):
        place(rows, 4, 97)
    with pytest.raises(ValueError, match="8 ranks, wanted a multiple of the 3"):
        place(rows, 8, ranks_a_node=3)
    with pytest.raises(ValueError, match="no FFN expert was chosen"):
        place(np.zeros((1, 2, 4)), 2)
    with pytest.raises(ValueError, match="a current placement of"):
        place(rows, 8, current=linear(2, 32, 4))
    with pytest.raises(ValueError, match="other experts than 32"):
        place(rows, 8, current=Placement(np.zeros((2, 8, 4), dtype=int)))
