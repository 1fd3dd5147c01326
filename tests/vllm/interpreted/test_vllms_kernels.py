"""vLLM's own Triton experts, as this package sets them up on a GPU: a choice of -1 is neither written nor read."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from longcat_core.plugin.requested import Requested
from tests.interpreted import Layer, layers
from tests.vllm.interpreted.gpu import computed

OWN = Requested()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("layer", layers(torch.float32)[:-1], ids=lambda layer: layer.name)
def test_a_dropped_choice_is_neither_written_nor_read(layer: Layer, ranks: int) -> None:
    for rank in range(ranks):
        run = computed(layer, OWN, rank, ranks)
        assert layer.error(run.output, rank, ranks) < 1e-5
        assert torch.equal(run.rows.isnan().all(dim=2), layer.is_dropped(rank, ranks))


def test_without_the_map_vllm_still_sums_what_is_not_written() -> None:
    """If this fails, the map of a rank with all experts may have become unnecessary (`Cuda.expert_map`)."""
    assert computed(layers(torch.float32)[0], OWN, has_map=False).output.isnan().any()


@pytest.mark.parametrize(("tokens", "takes_shortcut"), [(1, True), (10, True), (11, False)])
def test_few_tokens_take_vllms_shortcut_and_are_right(tokens: int, takes_shortcut: bool) -> None:
    """Of 12 choices among 512 experts each: its blocks of -1 write zeros; otherwise nothing is written for -1."""
    layer = Layer.random(tokens, 512, 256, 12)
    run = computed(layer, OWN)
    assert layer.error(run.output) < 1e-5
    dropped = run.rows[layer.is_dropped()]
    assert dropped.eq(0).all() if takes_shortcut else dropped.isnan().all()
