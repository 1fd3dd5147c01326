"""Core's kernels behind vLLM's modular interface, against core's reference in fp64."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from longcat_core.plugin.requested import Requested
from tests.interpreted import ERROR_OF_FP8, Layer, fp8_layer, layers
from tests.vllm.interpreted.gpu import computed

KERNELS = Requested(kernels=True)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("layer", layers(torch.float32), ids=lambda layer: layer.name)
def test_experts_are_the_reference_and_a_dropped_choice_has_no_row(layer: Layer, ranks: int) -> None:
    for rank in range(ranks):
        run = computed(layer, KERNELS, rank, ranks)
        assert layer.error(run.output, rank, ranks) < 1e-5
        assert torch.equal(run.rows.isnan().all(dim=2), layer.is_dropped(rank, ranks))


@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_in_fp8_are_the_reference_but_for_the_rounding_of_activations(ranks: int) -> None:
    layer = fp8_layer(torch.bfloat16)
    for rank in range(ranks):
        run = computed(layer, KERNELS, rank, ranks)
        assert layer.error(run.output, rank, ranks) < ERROR_OF_FP8
        assert torch.equal(run.rows.isnan().all(dim=2), layer.is_dropped(rank, ranks))


def test_experts_in_bf16_are_the_reference() -> None:
    layer = layers(torch.bfloat16)[0]
    assert layer.error(computed(layer, KERNELS).output) < 2**-6
