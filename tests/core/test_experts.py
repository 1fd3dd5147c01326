"""The zero-expert-aware MoE against a loop over slots in float64, and what it must not spend."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longcat_core.layers.experts import (
    ExpertFFN,
    add_identity,
    combine,
    compact,
    grouped_ffn,
    identity_share,
    moe,
    routed_experts,
)
from longcat_core.layers.routing import Routing, route
from tests.oracle import relative_error


class Problem(NamedTuple):
    x: Tensor
    routing: Routing
    w13: Tensor
    w2: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(self.x.to(dtype), self.routing, self.w13.to(dtype), self.w2.to(dtype))


def problem(
    seed: int = 0, tokens: int = 9, experts: int = 5, zero_experts: int = 3, top_k: int = 4, zero_bias: float = 0.0
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = 12, 6

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    bias = torch.zeros(experts + zero_experts)
    bias[experts:] = zero_bias
    routing = route(
        normal(tokens, experts + zero_experts),
        bias,
        n_routed_experts=experts,
        top_k=top_k,
        routed_scaling_factor=6.0,
    )
    w13, w2 = normal(experts, 2 * inner, hidden) * hidden**-0.5, normal(experts, hidden, inner) * inner**-0.5
    return Problem(normal(tokens, hidden), routing, w13, w2)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    experts, zero_experts = draw(st.integers(1, 6)), draw(st.integers(0, 6))
    return problem(
        seed=draw(st.integers(0, 2**31)),
        tokens=draw(st.integers(0, 9)),
        experts=experts,
        zero_experts=zero_experts,
        top_k=draw(st.integers(1, experts + zero_experts)),
        zero_bias=draw(st.sampled_from([-2.0, 0.0, 0.3, 2.0])),
    )


def loop(x: Tensor, routing: Routing, w13: Tensor, w2: Tensor) -> Tensor:
    """One slot of one token at a time, in float64."""
    x, w13, w2 = x.double(), w13.double(), w2.double()
    inner = w2.shape[2]
    rows = []
    for token in range(x.shape[0]):
        row = routing.identity[token].double() * x[token]
        for expert, weight in zip(routing.ids[token].tolist(), routing.weights[token].double(), strict=True):
            if expert >= 0:
                gate, up = w13[expert, :inner] @ x[token], w13[expert, inner:] @ x[token]
                row = row + weight * (w2[expert] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows) if rows else x


def counting(ffn: ExpertFFN, rows_seen: list[int]) -> ExpertFFN:
    def counted(rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        assert (experts >= 0).all()
        rows_seen.append(experts.numel())
        return ffn(rows, experts, weights)

    return counted


@given(problems())
def test_moe_is_that_of_a_loop_over_slots(case: Problem) -> None:
    output = moe(*case)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), loop(*case), rtol=1e-4, atol=1e-4)


@given(problems())
def test_zero_experts_cost_no_gemm_rows(case: Problem) -> None:
    seen: list[int] = []
    ffn = counting(grouped_ffn(case.w13, case.w2), seen)
    routed_experts(case.x, case.routing.ids, case.routing.weights, ffn)
    assert sum(seen) == (case.routing.ids >= 0).sum()


def test_a_batch_of_zero_experts_alone_runs_no_ffn() -> None:
    case = problem(zero_experts=5, zero_bias=2.0)
    assert (case.routing.ids == -1).all()
    seen: list[int] = []
    routed = routed_experts(
        case.x, case.routing.ids, case.routing.weights, counting(grouped_ffn(case.w13, case.w2), seen)
    )
    assert seen == []
    assert (routed == 0).all()
    torch.testing.assert_close(moe(*case), case.routing.identity[:, None] * case.x)


def test_without_zero_experts_every_slot_is_a_row() -> None:
    case = problem(zero_experts=0)
    rows = compact(case.routing.ids, case.routing.weights)
    assert rows.tokens.tolist() == [token for token in range(9) for _ in range(4)]
    assert torch.equal(moe(*case), routed_experts(*case[:1], *case.routing[:2], grouped_ffn(case.w13, case.w2)))


def test_rows_are_in_token_order_with_their_weights() -> None:
    ids = torch.tensor([[-1, 2], [-1, -1], [1, 0]], dtype=torch.int32)
    weights = torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.25, 0.125]])
    rows = compact(ids, weights)
    assert rows.tokens.tolist() == [0, 2, 2]
    assert rows.experts.tolist() == [2, 1, 0]
    assert rows.weights.tolist() == [0.5, 0.25, 0.125]


@given(problems(), st.integers(1, 3), st.integers(0, 2**31))
def test_ranks_with_a_part_of_the_experts_each_sum_to_the_whole(case: Problem, ranks: int, seed: int) -> None:
    experts = case.w2.shape[0]
    owner = torch.randint(ranks, (experts,), generator=torch.Generator().manual_seed(seed))
    total, seen = torch.zeros_like(case.x), []
    for rank in range(ranks):
        local = (owner == rank).nonzero().squeeze(1)
        expert_map = torch.full((experts,), -1, dtype=torch.int32)
        expert_map[local] = torch.arange(local.numel(), dtype=torch.int32)
        ffn = counting(grouped_ffn(case.w13[local], case.w2[local]), seen)
        total += routed_experts(case.x, case.routing.ids, case.routing.weights, ffn, expert_map)
    torch.testing.assert_close(add_identity(total, case.x, case.routing.identity), moe(*case), rtol=1e-4, atol=1e-4)
    assert sum(seen) == (case.routing.ids >= 0).sum(), "a slot is a row on one rank only"


@given(problems(), st.booleans())
def test_bf16_is_as_good_as_its_roundings(case: Problem, training: bool) -> None:
    case = case.to(torch.bfloat16)
    output = moe(case.x.requires_grad_(training), *case[1:])
    assert output.dtype == torch.bfloat16
    if case.x.shape[0]:
        # Three roundings inside an expert, one a row and two at the end, of 2^-9 each, on terms that may cancel.
        terms = loop(case.x.abs(), case.routing, case.w13.abs(), case.w2.abs())
        assert ((output.double() - loop(*case)).abs() <= 6 * 2**-9 * terms + 1e-6).all()


@pytest.mark.parametrize("training", [False, True])
def test_rows_are_summed_in_fp32(training: bool) -> None:
    ids = torch.zeros(2, 300, dtype=torch.int32)
    ids[1, 150:] = -1
    rows = compact(ids, torch.ones(2, 300))
    outputs = torch.full((450, 4), 1.0, dtype=torch.bfloat16, requires_grad=training)
    # bf16 has 8 bits: summed in bf16, ones stop at 256.
    assert combine(outputs, rows.tokens, 2).tolist() == [[300.0] * 4, [150.0] * 4]


def test_identity_is_added_in_fp32() -> None:
    x = torch.full((1, 4), 1.0, dtype=torch.bfloat16)
    identity = torch.tensor([1 + 2**-8])
    routed = torch.full((1, 4), -1.0, dtype=torch.bfloat16)
    assert add_identity(routed, x, identity).tolist() == [[2**-8] * 4]


def test_zero_experts_share_by_itself_is_rounded_once() -> None:
    """0.3 x 3 in bf16 is another number if 0.3 is rounded to bf16 before."""
    x, identity = torch.full((2, 4), 3.0, dtype=torch.bfloat16), torch.tensor([0.3, 0.0])
    assert torch.equal(identity_share(x, identity), (x.double() * identity.double()[:, None]).bfloat16())
    assert torch.equal(identity_share(x, identity), add_identity(torch.zeros_like(x), x, identity))


def test_gradients_are_those_of_the_loop() -> None:
    case = problem(tokens=7)
    leaves = [case.x, case.w13, case.w2, case.routing.weights, case.routing.identity]
    ours = [leaf.clone().requires_grad_() for leaf in leaves]
    theirs = [leaf.double().requires_grad_() for leaf in leaves]
    for function, (x, w13, w2, weights, identity) in ((moe, ours), (loop, theirs)):
        function(x, Routing(case.routing.ids, weights, identity), w13, w2).square().sum().backward()
    real = case.routing.ids >= 0
    for name, our, their in zip(("x", "w13", "w2", "weights", "identity"), ours, theirs, strict=True):
        assert our.grad is not None, name
        gradient, truth = (t.grad[real] if name == "weights" else t.grad for t in (our, their))
        assert truth.abs().max() > 0, name
        assert relative_error(gradient, truth) < 1e-5, name


@pytest.mark.parametrize("requires_grad", [False, True])
def test_rows_of_a_token_are_summed_in_fp32(requires_grad: bool) -> None:
    """With a gradient it is the path that a GPU takes. In bf16 256 and 1 is 256 again, as often as it is added."""
    outputs = torch.tensor([[256.0]] + [[1.0]] * 8 + [[3.0]], dtype=torch.bfloat16).requires_grad_(requires_grad)
    summed = combine(outputs, torch.tensor([0] * 9 + [1]), 2)
    assert summed.dtype == torch.bfloat16
    assert summed.flatten().tolist() == [264.0, 3.0]


def test_a_gpu_is_given_fp32_to_sum() -> None:
    """On a CPU torch sums bf16 in fp32 by itself, so that the sum does not tell."""
    given: list[torch.dtype] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.index_add.default:
                given.extend(each.dtype for each in args if isinstance(each, Tensor) and each.is_floating_point())
            return func(*args, **(kwargs or {}))

    outputs = torch.ones(3, 4, dtype=torch.bfloat16, requires_grad=True)
    with Noting():
        combine(outputs, torch.tensor([0, 0, 1]), 2)
    assert given == [torch.float32] * 2
