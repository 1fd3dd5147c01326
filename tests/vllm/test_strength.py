"""The tests' own strength: each thing that makes LongCat LongCat is broken once, and parity must fail each time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longcat_core import experts, rotary
from longcat_core.routing import Routing, route
from tests.cases import CASES, Case
from tests.oracle import assert_greedy_equal, greedy, oracle
from tests.vllm.engine import serving
from tests.vllm.test_moe import assert_kernel_is_reference
from tests.vllm.test_parity import assert_parity


def shortcut_added_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MoE's output joins the stream before the second attention, as in a plain MoE layer."""
    from longcat_vllm.model import LongcatDecoderLayer

    def forward(self: LongcatDecoderLayer, hidden: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor) -> object:
        if residual is None:
            residual, hidden = hidden, self.input_layernorm[0](hidden)
        else:
            hidden, residual = self.input_layernorm[0](hidden, residual)
        hidden, residual = self.post_attention_layernorm[0](self.self_attn[0](hidden, cos, sin), residual)
        hidden, residual = self.input_layernorm[1](self.mlps[0](hidden) + self.mlp(hidden), residual)
        hidden, residual = self.post_attention_layernorm[1](self.self_attn[1](hidden, cos, sin), residual)
        return self.mlps[1](hidden), residual

    monkeypatch.setattr(LongcatDecoderLayer, "forward", forward)


def zero_experts_unscaled(monkeypatch: pytest.MonkeyPatch) -> None:
    def unscaled(*args: Tensor, routed_scaling_factor: float, **kwargs: int) -> Routing:
        routing = route(*args, routed_scaling_factor=routed_scaling_factor, **kwargs)
        return routing._replace(identity=routing.identity / routed_scaling_factor)

    monkeypatch.setattr("longcat_vllm.moe.route", unscaled)


def query_scale_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longcat_core.config.LongcatConfig.q_scale", 1.0)


def latent_scale_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longcat_core.config.LongcatConfig.kv_scale", 1.0)


def rope_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    monkeypatch.setattr(rotary, "rotate_interleaved", rotate_halves)


def correction_bias_in_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def biased(logits: Tensor, bias: Tensor, **kwargs: int) -> Routing:
        return route((logits.softmax(-1) + bias).clamp(min=1e-9).log(), torch.zeros_like(bias), **kwargs)

    monkeypatch.setattr("longcat_vllm.moe.route", biased)


@pytest.mark.parametrize(
    "break_it",
    [
        shortcut_added_early,
        zero_experts_unscaled,
        query_scale_left_out,
        latent_scale_left_out,
        rope_in_halves,
        correction_bias_in_the_weights,
    ],
)
def test_parity_fails_when_the_model_is_broken(
    break_it: Callable[[pytest.MonkeyPatch], None],
    checkpoint_of: Callable[[Case], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_it(monkeypatch)
    with pytest.raises(AssertionError, match=r"relative_error|token \d+ is"):
        assert_parity(CASES["default"], checkpoint_of(CASES["default"]))


@pytest.mark.usefixtures("two_ranks_on_few_cores")
def test_expert_parallel_parity_fails_when_the_expert_map_is_broken(checkpoint_of: Callable[[Case], Path]) -> None:
    case = CASES["default"]
    prompt = case.prompts(1, 40)[0]
    truth = greedy(oracle(case.config, case.published()), prompt, 8)
    broken = "tests.vllm.broken_expert_map.BrokenExpertMap"
    ranks: dict[str, Any] = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    with serving(checkpoint_of(case), **ranks, worker_extension_cls=broken) as engine:
        tokens = engine.greedy([prompt], 8)[0]
    with pytest.raises(AssertionError, match=r"token \d+ is"):
        assert_greedy_equal(tokens, truth)


def test_the_kernel_test_fails_when_the_expert_map_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w13, w2 = torch.randn(9, 32), torch.randn(4, 64, 32), torch.randn(4, 32, 32)
    routing = Routing(torch.randint(4, (9, 2), dtype=torch.int32), torch.rand(9, 2), torch.zeros(9))
    assert_kernel_is_reference("vector", 2, (x, w13, w2, routing))
    routed = experts.routed_experts
    monkeypatch.setattr(
        "longcat_vllm.cpu_experts.routed_experts",
        lambda x, ids, weights, ffn, _map: routed(x, ids.clamp(max=1), weights, ffn),
    )
    with pytest.raises(AssertionError, match="relative_error"):
        assert_kernel_is_reference("vector", 2, (x, w13, w2, routing))
