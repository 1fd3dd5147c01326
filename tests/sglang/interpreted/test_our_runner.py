"""Core's kernels as a runner core of SGLang, against core's reference in fp64."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from longcat_core.kernels import moe as kernels
from longcat_core.kernels.tiles import tile_for
from longcat_core.layers.experts import moe
from longcat_core.layers.routing import route
from longcat_sglang.devices.cuda.kernels import LongcatRunnerCore
from tests.interpreted import ERROR_OF_FP8, Layer, fp8_layer, layers
from tests.oracle import relative_error
from tests.sglang.interpreted.gpu import built, computed


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("layer", layers(torch.float32), ids=lambda layer: layer.name)
def test_experts_are_the_reference(layer: Layer, ranks: int) -> None:
    for rank in range(ranks):
        run = computed(layer, kernels=True, rank=rank, ranks=ranks)
        assert layer.error(run.output, rank, ranks) < 1e-5
        assert run.activated is None, "not SGLang's own kernels"


@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_in_fp8_are_the_reference_but_for_the_rounding_of_activations(ranks: int) -> None:
    layer = fp8_layer(torch.bfloat16)
    for rank in range(ranks):
        run = computed(layer, kernels=True, rank=rank, ranks=ranks)
        assert layer.error(run.output, rank, ranks) < ERROR_OF_FP8
        assert run.activated is None


def test_a_tile_is_for_the_rows_of_all_ranks_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(kernels, "tile_for", lambda *given: asked.append(given[2]) or tile_for(*given))
    computed(layers(torch.float32)[0], kernels=True, rank=1, ranks=2)
    assert asked == [33 * 4 // (8 + 4)]


@pytest.mark.parametrize("tokens", [0, 6])
def test_router_and_experts_are_the_reference(tokens: int) -> None:
    layer = Layer.random(6, 8, 4, 4)
    x = layer.x[:tokens]
    with built(layer, kernels=True) as (mlp, _), torch.no_grad():
        assert isinstance(mlp.experts.runner.runner_core, LongcatRunnerCore)
        mlp.router.classifier.weight.data = torch.randn(12, 64, generator=torch.Generator().manual_seed(0)) / 8
        logits = x.double() @ mlp.router.classifier.weight.double().T
        shortcut = mlp(x)
    routing = route(
        logits, torch.zeros(12), n_routed_experts=8, top_k=4, routed_scaling_factor=mlp.config.routed_scaling_factor
    )
    truth = moe(x.double(), routing, layer.experts.w13.double(), layer.experts.w2.double())
    assert shortcut.partial.shape == shortcut.whole.shape == truth.shape
    assert tokens == 0 or relative_error(shortcut.partial + shortcut.whole, truth) < 1e-4
