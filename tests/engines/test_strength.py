"""The tests' own strength: each thing that makes LongCat LongCat is broken once, and parity must fail each time."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat_core.layers import rotary
from longcat_core.layers.routing import Routing, route
from tests.cases import CASES, Case
from tests.engines.test_parity import assert_parity
from tests.harness import ENGINE, engine

shortcut_added_early = import_module(f"tests.{ENGINE}.broken").shortcut_added_early


def zero_experts_unscaled(monkeypatch: pytest.MonkeyPatch) -> None:
    def unscaled(*args: Tensor, routed_scaling_factor: float, **kwargs: int) -> Routing:
        routing = route(*args, routed_scaling_factor=routed_scaling_factor, **kwargs)
        return routing._replace(identity=routing.identity / routed_scaling_factor)

    monkeypatch.setattr(f"{engine.PACKAGE}.devices.cpu.device.route", unscaled)


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

    monkeypatch.setattr(f"{engine.PACKAGE}.devices.cpu.device.route", biased)


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
    break_it: Callable[[pytest.MonkeyPatch], None], checkpoint_of: Callable[[Case], Path]
) -> None:
    with pytest.raises(AssertionError, match=r"relative_error|token \d+ is"):
        assert_parity(CASES["default"], checkpoint_of(CASES["default"]), broken=break_it)


def test_expert_parallel_parity_fails_when_the_expert_map_is_broken(checkpoint_of: Callable[[Case], Path]) -> None:
    with pytest.raises(AssertionError, match=r"relative_error|token \d+ is"):
        assert_parity(
            CASES["default"],
            checkpoint_of(CASES["default"]),
            tensor_parallel=2,
            expert_parallel=True,
            **import_module(f"tests.{ENGINE}.broken").EXPERT_MAP,
        )
