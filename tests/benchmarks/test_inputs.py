"""What the MoE layer is measured on: routings, batches, costs, and the reference that results are held to."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu.checks import WrongResultError, check, truth, worst_token_error
from benchmarks.gpu.inputs import Batch, cost, random_batch, random_routing, random_weights, spread
from benchmarks.gpu.sizes import CHAT, FULL, SHARED_BYTES, TINY, Deployment
from longcat_core.kernels.tiles import DEFAULT, TILES
from longcat_core.layers.experts import moe
from longcat_core.layers.routing import expert_rows, relative_load
from longcat_core.weights.blocks import dequantize_blocks

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["random", "skewed"])
def test_a_third_of_the_choices_are_zero_experts(kind: str) -> None:
    routing = random_routing(CHAT, 2048, kind, torch.Generator().manual_seed(0))
    assert float((routing.ids < 0).double().mean()) == pytest.approx(1 / 3, abs=0.02)


def test_a_skewed_router_prefers_some_experts() -> None:
    busiest = {}
    for kind in ("random", "skewed"):
        routing = random_routing(CHAT, 2048, kind, torch.Generator().manual_seed(0))
        busiest[kind] = float(relative_load(expert_rows(routing.ids, 512)).max())
    assert busiest["random"] < 2
    assert 4 < busiest["skewed"] < 40


def small(deployment: Deployment, tokens: int, is_remapped: bool) -> Batch:
    config = replace(CHAT, hidden_size=8)
    return random_batch(config, deployment, tokens, "random", is_remapped, CPU)


@pytest.mark.parametrize("local", [64, 4])
@pytest.mark.parametrize(("is_remapped", "choices"), [(False, 8), (True, 12)])
def test_a_rank_has_its_share_of_the_choices(local: int, is_remapped: bool, choices: int) -> None:
    """Of 12 choices about 8 are FFN experts; remapped, all are."""
    tensor = small(Deployment("tensor", local), 2048, is_remapped)
    assert tensor.hidden_states.shape[0] == 2048
    rows = int((tensor.local_ids >= 0).sum())
    expected = 2048 * choices * local / 512
    assert rows == pytest.approx(expected, abs=4 * expected**0.5)
    data = small(Deployment("data", local), 2048 * local // 512, is_remapped)
    assert len(data.hidden_states) == int((data.local_ids >= 0).sum())
    assert len(data.hidden_states) == pytest.approx(expected, abs=4 * expected**0.5)
    assert int(data.local_ids.max()) == local - 1


def test_remapping_changes_no_result() -> None:
    config, deployment = TINY.config, TINY.deployments[0]
    weights = random_weights(config, deployment.local_experts, "16 bit", CPU)
    dropped, remapped = (random_batch(config, deployment, 9, "random", flag, CPU) for flag in (False, True))
    assert int((remapped.routing.ids < 0).sum()) == 0
    torch.testing.assert_close(truth(dropped, weights), truth(remapped, weights))


def test_remapped_slots_are_spread_over_all_experts() -> None:
    ids = torch.full((64, 8), -1, dtype=torch.int32)
    ids[0, 0] = 77
    assert torch.bincount(spread(ids, 128).flatten())[:77].tolist() == [3] + [4] * 76
    assert int(spread(ids, 128)[0, 0]) == 77


@pytest.mark.parametrize("precision", ["16 bit", "fp8"])
def test_the_truth_is_the_reference_in_fp32(precision: str) -> None:
    config = TINY.config
    weights = random_weights(config, config.n_routed_experts, precision, CPU)
    batch = random_batch(config, Deployment("tensor", config.n_routed_experts), 9, "random", False, CPU)
    wide = []
    for weight, scales in ((weights.w13, weights.w13_scales), (weights.w2, weights.w2_scales)):
        pairs = None if scales is None else list(zip(weight, scales, strict=True))
        wide.append(weight.float() if pairs is None else torch.stack([dequantize_blocks(*pair) for pair in pairs]))
    wanted = moe(batch.hidden_states.float(), batch.routing, *wide)
    # In FP8 the truth rounds activations as kernels do: e4m3 has 3 bits of mantissa.
    assert worst_token_error(truth(batch, weights), wanted) < (1e-5 if precision == "16 bit" else 0.08)


def test_the_cost_is_what_is_touched() -> None:
    config = TINY.config
    weights = random_weights(config, 2, "fp8", CPU)
    batch = random_batch(config, Deployment("tensor", 2), 5, "random", False, CPU)
    found, local = cost(batch, weights), batch.local_ids
    assert found.rows == sum(id_ >= 0 for id_ in local.flatten().tolist())
    touched = {id_ for id_ in local.flatten().tolist() if id_ >= 0}
    assert found.touched_experts == len(touched)
    of_expert = 3 * 128 * 128 + 3 * 4  # FP8, and fp32 scales of three blocks
    assert found.bytes == len(touched) * of_expert + 2 * 5 * 128 * 2
    assert found.operations == found.rows * 2 * 3 * 128 * 128


def test_one_wrong_token_is_found() -> None:
    wanted = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    found = wanted.clone()
    assert check(found, wanted, 0.02) == 0.0
    found[321] = found[320]
    with pytest.raises(WrongResultError, match=r"worst token's error .* wanted at most 0\.02"):
        check(found, wanted, 0.02)
    found[321] = float("nan")
    with pytest.raises(WrongResultError, match="error inf"):
        check(found, wanted, 0.02)
    with pytest.raises(WrongResultError, match=r"shape \(499, 64\): wanted \(500, 64\)"):
        check(wanted[1:], wanted, 0.02)


def test_tiles_that_are_tried_fit_and_include_those_that_are_taken() -> None:
    for precision, tiles in FULL.tiles.items():
        assert len(tiles) == len(set(tiles))
        assert {tile for _, tile in TILES[DEFAULT][precision]} <= set(tiles)
        item = 1 if precision == "fp8" else 2
        for tile in tiles:
            assert tile.stages * tile.depth * (tile.rows + 2 * tile.columns) * item <= SHARED_BYTES
            assert precision != "fp8" or (tile.columns, tile.depth) == (128, 128)
