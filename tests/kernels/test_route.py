"""The router's kernel against a loop over tokens in fp64."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from longcat_core.kernels.route import route
from longcat_core.layers import routing as reference


def logits_and_bias(seed: int, tokens: int, experts: int, bias_std: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator) * 2
    return logits, torch.randn(experts, generator=generator) * bias_std


def is_clear(logits: Tensor, bias: Tensor) -> bool:
    """Whether no two sums are so close that fp32 could decide, unless they are equal."""
    steps = (logits.double().softmax(dim=-1) + bias.double()).sort(dim=-1).values.diff(dim=-1)
    return bool(((steps > 1e-6) | (steps == 0)).all())


def assert_routed(ours: reference.Routing, logits: Tensor, bias: Tensor, routed: int, scaling: float) -> None:
    """`ours` is what a stable sort in fp64 chooses."""
    scores = logits.double().softmax(dim=-1)
    order = (scores + bias.double()).sort(dim=-1, descending=True, stable=True).indices
    chosen = order[:, : ours.ids.shape[1]]
    is_zero = chosen >= routed
    weights = scores.gather(1, chosen) * scaling
    assert torch.equal(ours.ids, chosen.masked_fill(is_zero, -1).int())
    assert (ours.weights[is_zero] == 0).all()
    torch.testing.assert_close(ours.weights.double(), weights.masked_fill(is_zero, 0), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(ours.identity.double(), (weights * is_zero).sum(1), rtol=1e-5, atol=1e-12)


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 5),
    routed=st.integers(1, 40),
    zero=st.integers(0, 30),
    top_k=st.integers(1, 16),
    scaling=st.sampled_from([1.0, 2.5, 6.0]),
    bias_std=st.sampled_from([0.0, 0.05, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_routing_is_that_of_a_sort_in_fp64(
    seed: int, tokens: int, routed: int, zero: int, top_k: int, scaling: float, bias_std: float, dtype: torch.dtype
) -> None:
    assume(top_k <= routed + zero)
    logits, bias = logits_and_bias(seed, tokens, routed + zero, bias_std)
    sizes = {"n_routed_experts": routed, "top_k": top_k, "routed_scaling_factor": scaling}
    ours, theirs = route(logits.to(dtype), bias, **sizes), reference.route(logits.to(dtype), bias, **sizes)
    assert [(t.dtype, t.shape) for t in ours] == [(t.dtype, t.shape) for t in theirs]
    assume(is_clear(logits.to(dtype), bias))
    assert_routed(ours, logits.to(dtype), bias, routed, scaling)


@pytest.mark.parametrize("zero", [0, 256])
def test_the_published_sizes_are_those_of_the_reference(zero: int) -> None:
    logits, bias = logits_and_bias(0, 3, 512 + zero, 0.01)
    sizes = {"n_routed_experts": 512, "top_k": 12, "routed_scaling_factor": 6.0}
    for ours, theirs in zip(route(logits, bias, **sizes), reference.route(logits, bias, **sizes), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_of_equal_scores_the_first_expert_is_taken_first() -> None:
    logits = torch.zeros(2, 24)
    logits[1, [20, 7, 3]] = 1.0
    bias = torch.zeros(24)
    ours = route(logits, bias, n_routed_experts=20, top_k=6, routed_scaling_factor=6.0)
    assert ours.ids.tolist() == [[0, 1, 2, 3, 4, 5], [3, 7, -1, 0, 1, 2]]
    assert_routed(ours, logits, bias, 20, 6.0)


def test_sums_below_zero_are_in_order() -> None:
    logits, bias = logits_and_bias(1, 4, 12, 0.3)
    ours = route(logits, bias - 3, n_routed_experts=8, top_k=7, routed_scaling_factor=6.0)
    assert_routed(ours, logits, bias - 3, 8, 6.0)


def test_a_bias_can_move_every_slot_to_zero_experts() -> None:
    logits, bias = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)), torch.zeros(12)
    bias[8:] = 2.0
    ours = route(logits, bias, n_routed_experts=8, top_k=4, routed_scaling_factor=6.0)
    assert (ours.ids == -1).all()
    assert (ours.weights == 0).all()
    torch.testing.assert_close(ours.identity, 6 * logits.softmax(-1)[:, 8:].sum(-1))


def test_an_expert_without_a_chance_weighs_nothing_and_harms_no_other() -> None:
    logits, bias = torch.tensor([[0.0, float("-inf"), 1.0, float("-inf")]]), torch.zeros(4)
    ours = route(logits, bias, n_routed_experts=4, top_k=3, routed_scaling_factor=1.0)
    assert ours.ids.tolist() == [[2, 0, 1]]
    torch.testing.assert_close(ours.weights, torch.tensor([[1.0, 0.0]]).softmax(-1) @ torch.eye(2, 3))


def test_a_token_that_is_not_a_number_has_ids_that_exist() -> None:
    logits = torch.zeros(2, 12)
    logits[0, 3] = float("nan")
    ours = route(logits, torch.zeros(12), n_routed_experts=8, top_k=10, routed_scaling_factor=6.0)
    assert (ours.ids < 8).all()
    assert ours.weights[0][ours.ids[0] >= 0].isnan().all()
    assert ours.weights[1].isfinite().all()


@pytest.mark.parametrize("sign", [1, -1])
def test_an_expert_whose_bias_is_not_a_number_is_taken_first_as_in_topk(sign: int) -> None:
    logits, bias = logits_and_bias(4, 1, 12, 0.05)
    bias[5] = torch.tensor(float("nan")).copysign(torch.tensor(float(sign)))
    sizes = {"n_routed_experts": 8, "top_k": 4, "routed_scaling_factor": 6.0}
    ours, theirs = route(logits, bias, **sizes), reference.route(logits, bias, **sizes)
    assert ours.ids.tolist() == theirs.ids.tolist()
    assert ours.ids[0, 0] == 5


def test_a_token_is_routed_alike_in_any_batch() -> None:
    logits, bias = logits_and_bias(2, 7, 48, 0.05)
    sizes = {"n_routed_experts": 32, "top_k": 5, "routed_scaling_factor": 6.0}
    batch = route(logits, bias, **sizes)
    for token in range(7):
        alone = route(logits[token : token + 1], bias, **sizes)
        assert all(torch.equal(one[0], many[token]) for one, many in zip(alone, batch, strict=True))


def test_rows_may_lie_apart() -> None:
    logits, bias = logits_and_bias(3, 4, 20, 0.05)
    sizes = {"n_routed_experts": 12, "top_k": 5, "routed_scaling_factor": 6.0}
    wide = torch.full((4, 31), float("nan"))
    wide[:, :20] = logits
    apart, close = route(wide[:, :20], bias, **sizes), route(logits, bias, **sizes)
    assert all(torch.equal(one, other) for one, other in zip(apart, close, strict=True))


@pytest.mark.parametrize(
    ("logits", "bias", "top_k", "message"),
    [
        (torch.zeros(1, 1025), torch.zeros(1025), 4, "1025 experts: wanted at most 1024"),
        (torch.zeros(1, 40), torch.zeros(40), 17, "top_k 17 of 40 experts: wanted 1 to 16"),
        (torch.zeros(1, 4), torch.zeros(4), 5, "top_k 5 of 4 experts: wanted 1 to 4"),
        (torch.zeros(1, 4), torch.zeros(3), 2, r"bias of shape \(3,\): wanted \(4,\)"),
        (torch.zeros(4, 6).T, torch.zeros(4), 2, "wanted contiguous rows"),
    ],
)
def test_what_it_cannot_route_is_an_error(logits: Tensor, bias: Tensor, top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(logits, bias, n_routed_experts=4, top_k=top_k, routed_scaling_factor=6.0)
