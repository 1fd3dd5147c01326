"""vLLM's own Triton experts, as this package sets them up on a GPU: a choice of -1 is neither written nor read."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from vllm.distributed.eplb.eplb_state import compute_logical_maps
from vllm.platforms import current_platform

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


def map_and_count() -> Callable[..., Tensor]:
    """What vLLM's router has on a GPU."""
    spec = importlib.util.find_spec("vllm.model_executor.layers.fused_moe.router.base_router")
    assert spec is not None
    assert spec.loader is not None
    router = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(current_platform), "is_cuda_alike", lambda _: True)
        spec.loader.exec_module(router)
    found: Callable[..., Tensor] = router.eplb_map_to_physical_and_record
    return found


def test_a_zero_expert_has_no_place_where_experts_move_and_is_not_counted() -> None:
    places = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0, 7, 7])
    of_experts, counts = compute_logical_maps(places, 8)
    ids = torch.randint(-1, 8, (100, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    rows, tokens = torch.zeros(len(places), dtype=torch.int32), torch.tensor(90, dtype=torch.int32)
    placed = map_and_count()(ids, rows, of_experts, counts, torch.tensor(True), tokens)
    assert torch.equal(placed < 0, ids < 0)
    assert torch.equal(torch.cat((places, torch.tensor([-1])))[placed.long()], ids.long())
    assert placed[ids == 7].unique().tolist() == [0, 8, 9]
    real = placed[:90]
    assert torch.equal(rows.long(), torch.bincount(real[real >= 0].long(), minlength=len(places)))
