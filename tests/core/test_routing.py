"""The router against a loop that follows the report, and the load statistics that come of it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from longcat_core.layers.routing import Routing, expert_rows, rank_imbalance, relative_load, route


def random_route(
    seed: int, tokens: int, experts: int, zero_experts: int, top_k: int, scaling: float, bias_std: float
) -> tuple[Routing, Tensor, Tensor]:
    """A routing with the logits and the bias it came from."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts + zero_experts, generator=generator) * 2
    bias = torch.randn(experts + zero_experts, generator=generator) * bias_std
    routing = route(logits, bias, n_routed_experts=experts, top_k=top_k, routed_scaling_factor=scaling)
    return routing, logits, bias


@st.composite
def routings(draw: st.DrawFn) -> tuple[Routing, Tensor, Tensor, int, int, float]:
    tokens, experts, zero_experts = draw(st.integers(0, 6)), draw(st.integers(1, 9)), draw(st.integers(0, 9))
    top_k = draw(st.integers(1, experts + zero_experts))
    scaling, bias_std = draw(st.sampled_from([1.0, 2.5, 6.0])), draw(st.sampled_from([0.0, 0.05, 1.0]))
    routed = random_route(draw(st.integers(0, 2**31)), tokens, experts, zero_experts, top_k, scaling, bias_std)
    return *routed, experts, top_k, scaling


def choose(logits: list[float], bias: list[float], top_k: int) -> tuple[list[float], list[int]]:
    """Scores of one token and its experts, best first, in Python floats; skips what rounding could decide."""
    largest = max(logits)
    exponentials = [math.exp(logit - largest) for logit in logits]
    scores = [value / sum(exponentials) for value in exponentials]
    order = sorted(range(len(scores)), key=lambda expert: -(scores[expert] + bias[expert]))
    ranked = [scores[expert] + bias[expert] for expert in order]
    assume(all(better - worse > 1e-5 for better, worse in itertools.pairwise(ranked)))
    return scores, order[:top_k]


@given(routings())
def test_routing_is_that_of_a_loop_over_tokens(case: tuple[Routing, Tensor, Tensor, int, int, float]) -> None:
    routing, logits, bias, experts, top_k, scaling = case
    assert (routing.ids.dtype, routing.weights.dtype, routing.identity.dtype) == (
        torch.int32,
        torch.float32,
        torch.float32,
    )
    assert routing.ids.shape == routing.weights.shape == (len(logits), top_k)
    assert routing.identity.shape == (len(logits),)
    for token, row in enumerate(logits.tolist()):
        scores, chosen = choose(row, bias.tolist(), top_k)
        assert routing.ids[token].tolist() == [expert if expert < experts else -1 for expert in chosen]
        weights = [scores[expert] * scaling if expert < experts else 0.0 for expert in chosen]
        assert routing.weights[token].tolist() == pytest.approx(weights, rel=1e-4, abs=1e-9)
        identity = sum(scores[expert] * scaling for expert in chosen if expert >= experts)
        assert routing.identity[token].item() == pytest.approx(identity, rel=1e-4, abs=1e-9)


@given(routings())
def test_slots_of_zero_experts_weigh_nothing(case: tuple[Routing, Tensor, Tensor, int, int, float]) -> None:
    routing = case[0]
    assert (routing.weights[routing.ids == -1] == 0).all()
    assert (routing.weights[routing.ids >= 0] > 0).all()
    assert ((routing.identity == 0) == (routing.ids >= 0).all(dim=1)).all()


@given(routings())
def test_the_bias_takes_part_in_the_choice_only(case: tuple[Routing, Tensor, Tensor, int, int, float]) -> None:
    routing, logits, _, experts, _, scaling = case
    scores = logits.double().softmax(dim=-1) * scaling
    expected = scores.gather(1, routing.ids.clamp(min=0).long()).masked_fill(routing.ids < 0, 0)
    torch.testing.assert_close(routing.weights.double(), expected, rtol=1e-4, atol=1e-7)
    if experts == scores.shape[1]:
        assert (routing.identity == 0).all()


def test_a_bias_can_move_every_slot_to_zero_experts() -> None:
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(12)
    bias[8:] = 2.0
    routing = route(logits, bias, n_routed_experts=8, top_k=4, routed_scaling_factor=6.0)
    assert (routing.ids == -1).all()
    torch.testing.assert_close(routing.identity, 6 * logits.softmax(-1)[:, 8:].sum(-1))
    assert expert_rows(routing.ids, 8).tolist() == [0] * 8


def test_equal_bias_for_all_changes_nothing() -> None:
    routing, logits, bias = random_route(0, 16, 8, 4, 4, 6.0, 0.05)
    shifted = route(logits, bias + 0.25, n_routed_experts=8, top_k=4, routed_scaling_factor=6.0)
    assert torch.equal(routing.ids, shifted.ids)
    assert torch.equal(routing.weights, shifted.weights)
    assert torch.equal(routing.identity, shifted.identity)


def test_all_experts_chosen_share_the_whole_scaling_factor() -> None:
    routing, *_ = random_route(0, 16, 7, 5, 12, 6.0, 0.05)
    torch.testing.assert_close(routing.weights.sum(1) + routing.identity, torch.full((16,), 6.0))


@given(routings())
def test_zero_experts_have_no_place_in_the_load(case: tuple[Routing, Tensor, Tensor, int, int, float]) -> None:
    routing, _, _, experts, _, _ = case
    rows = expert_rows(routing.ids, experts)
    assert rows.tolist() == [sum(row.count(expert) for row in routing.ids.tolist()) for expert in range(experts)]
    assert rows.dtype == torch.int64
    assert rows.sum() == (routing.ids >= 0).sum()


def test_zero_experts_remapped_to_expert_0_would_look_like_an_imbalance() -> None:
    ids = torch.tensor([[0, 1, -1], [2, 3, -1], [-1, -1, -1]], dtype=torch.int32)
    assert rank_imbalance(expert_rows(ids, 4), ranks=2) == 1.0
    remapped = expert_rows(ids.clamp(min=0), 4)
    assert remapped.tolist() == [6, 1, 1, 1]
    assert rank_imbalance(remapped, ranks=2) == pytest.approx(7 / 4.5)


def test_imbalance_is_the_busiest_rank_over_the_mean() -> None:
    rows = torch.tensor([4, 0, 0, 2, 2, 1, 1])  # on 3 ranks: 4, 4, 2
    assert rank_imbalance(rows, ranks=3) == pytest.approx(4 / (10 / 3))
    assert rank_imbalance(rows, ranks=1) == 1.0
    assert rank_imbalance(torch.zeros(8), ranks=2) == 0.0


def test_load_is_over_the_mean_of_each_layer() -> None:
    rows = torch.tensor([[1, 3], [0, 0], [5, 5]])
    assert relative_load(rows).tolist() == [[0.5, 1.5], [0.0, 0.0], [1.0, 1.0]]


def test_more_ranks_than_experts_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 experts on 4 ranks"):
        rank_imbalance(torch.ones(3), ranks=4)


def test_logits_in_bf16_are_routed_as_the_same_numbers_in_fp32() -> None:
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    sizes = {"n_routed_experts": 8, "top_k": 4, "routed_scaling_factor": 6.0}
    rounded, exact = (route(given, torch.zeros(12), **sizes) for given in (logits, logits.float()))
    assert rounded.weights.dtype == torch.float32
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(rounded, exact, strict=True))
