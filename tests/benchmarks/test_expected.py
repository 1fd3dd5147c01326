"""The computed times of a MoE layer: bounds, what follows from them, and the tables of docs/kernels.md."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import expected
from benchmarks.gpu.expected import Situation, floor_seconds, our_seconds, vllm_seconds
from benchmarks.gpu.sizes import CHAT, TOKENS, Deployment
from longcat_core.kernels.tiles import DEFAULT, TILES
from longcat_core.planning.hardware import architecture, gpu, gpus
from longcat_core.planning.occupancy import programs_at_once

ROOT = Path(__file__).parents[2]
COMPILED = json.loads(expected.COMPILED.read_text())
SITUATIONS = [
    Situation(gpu(name), CHAT, precision, deployment, tokens)
    for name in gpus()
    for precision in ("16 bit", "fp8")
    for deployment in expected.DEPLOYMENTS
    for tokens in TOKENS
]


def situation(tokens: int, precision: str = "16 bit", kind: str = "tensor", local: int = 64) -> Situation:
    return Situation(gpu("H100"), CHAT, precision, Deployment(kind, local), tokens)


def test_no_kernel_is_faster_than_the_floor() -> None:
    for of in SITUATIONS:
        floor = floor_seconds(of)
        assert floor < our_seconds(of)
        assert floor < vllm_seconds(of, is_remapped=False) < vllm_seconds(of, is_remapped=True)


def test_the_floor_of_few_tokens_is_reading_the_experts_that_they_touch() -> None:
    """One token has 8 FFN experts of 512 on average, so one of 64: 37.7 M weights in bf16, at 90 % of 3.35 TB/s."""
    weights, states = 37_748_736 * 2, 2 * 6144 * 2
    assert floor_seconds(situation(1)) == pytest.approx((weights + states) / (0.9 * 3.35e12))
    in_fp8 = 37_748_736 * (1 + 4 / 16384) + states
    assert floor_seconds(situation(1, "fp8")) == pytest.approx(in_fp8 / (0.9 * 3.35e12))


def test_the_floor_of_many_rows_is_multiplying_them() -> None:
    """8,192 tokens a rank give each rank 65,536 rows of experts."""
    operations = 65_536 * 2 * 37_748_736
    assert floor_seconds(situation(8192, kind="data")) == pytest.approx(operations / (0.8 * 989e12))


def test_remapping_costs_more_experts_read_in_decode_and_half_as_many_rows_again_in_prefill() -> None:
    decode, prefill = situation(8), situation(8192, kind="data")
    touched = [of_load.touched_experts for of_load in (decode.load(False), decode.load(True))]
    assert touched[1] / touched[0] == pytest.approx(1.46, abs=0.01)
    rows = [of_load.rows for of_load in (prefill.load(False), prefill.load(True))]
    assert rows[1] / rows[0] == pytest.approx(1.5)


def test_where_weights_are_all_read_anyway_dropping_saves_little() -> None:
    """So a goal of 1.4 from 512 tokens can be met only where arithmetic bounds the layer."""
    of = situation(512)
    assert vllm_seconds(of, is_remapped=True) / floor_seconds(of) < 1.1
    busy = situation(8192, kind="data")
    assert vllm_seconds(busy, is_remapped=True) / our_seconds(busy) > 1.4


def test_our_tiles_use_the_devices_own_instructions() -> None:
    for precision in ("16 bit", "fp8"):
        for _, tile in TILES[DEFAULT][precision]:
            assert not expected.uses_older_instructions(precision, tile.rows, "sm_90")
    assert expected.uses_older_instructions("32 bit", 16, "sm_90")


def test_enough_is_on_its_way_to_read_memory_at_its_rate() -> None:
    """Of each product in 16 bit and FP8: what the programs of a multiprocessor load ahead, against what memory gives in
    a microsecond, which is more than its latency."""
    h100 = gpu("H100")
    of_a_multiprocessor = h100.bytes_per_second * 1e-6 / h100.multiprocessors
    for record in COMPILED.values():
        for name, codes in record.items():
            code = codes["sm_90"]
            if code["tile"] is not None and "32 bit" not in name and "router" not in name:
                assert code["programs_at_once"] * code["shared_bytes"] > of_a_multiprocessor, name


def test_occupancy_on_record_is_what_the_code_needs() -> None:
    for record in COMPILED.values():
        for name, codes in record.items():
            for target, code in codes.items():
                needs = (code["warps"], code["registers"], code["shared_bytes"])
                assert code["programs_at_once"] == programs_at_once(architecture(target), *needs) > 0, name


def test_a_tile_on_record_has_its_bytes_and_operations() -> None:
    tiles = {
        f"{precision}, blocks of {tile.rows}": tile
        for precision in TILES[DEFAULT]
        for _, tile in TILES[DEFAULT][precision]
    }
    item = {"16 bit": 2, "fp8": 1, "32 bit": 4}
    for record in COMPILED.values():
        for name, tile in tiles.items():
            for kernel, weights in (("gate_up", 2), ("down", 1)):
                work = record[f"experts in {name}: {kernel}"]["sm_90"]["tile"]
                read = (tile.rows + weights * tile.columns) * tile.depth * item[name.split(",")[0]]
                assert work == {"bytes": read, "operations": 2 * weights * tile.rows * tile.columns * tile.depth}
        assert record["route: route"]["sm_90"]["tile"] is None


def test_vllm_takes_tiles_by_the_number_of_tokens() -> None:
    assert [expected.vllm_tile("16 bit", tokens) for tokens in (32, 64, 96, 512, 513)] == [
        (16, 64), (32, 64), (32, 128), (64, 128), (128, 128)
    ]  # fmt: skip
    assert [expected.vllm_tile("fp8", tokens) for tokens in (8, 64, 65)] == [(16, 64), (16, 128), (64, 128)]


def test_the_page_has_the_tables_as_they_are_computed() -> None:
    page = (ROOT / "docs/kernels.md").read_text()
    for table in expected.tables("H100"):
        assert table in page, "python -m benchmarks.gpu.expected"
