"""What a GPU holds: parameters, weights, cache, and who fits where, against published sizes and the dry run's."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longcat_core import spellings
from longcat_core.planning.hardware import gpu
from longcat_core.planning.layout import Layout, layouts, precision
from longcat_core.planning.memory import checkpoint_bytes, memory, weights
from longcat_core.planning.models import model, of_config
from tests.cases import DEFAULT

CHAT, LITE, SPARSE = model("chat"), model("lite"), model("longcat-2.0")


def test_parameters_are_those_worked_out_by_hand() -> None:
    assert CHAT.attention_parameters == 90_570_752
    assert model("deepseek-v3").attention_parameters == 187_105_280
    assert CHAT.expert_parameters == 37_748_736
    assert CHAT.total_parameters == pytest.approx(560.664e9, rel=1e-5)
    assert CHAT.mtp_parameters == pytest.approx(392.6e6, rel=1e-3)
    assert CHAT.activated_parameters(8) == pytest.approx(27.1e9, rel=1e-2)
    assert CHAT.activated_parameters(0) == pytest.approx(18.6e9, rel=1e-2)
    assert LITE.total_parameters == pytest.approx(68.562e9, rel=1e-4)
    assert model("deepseek-v3").total_parameters == pytest.approx(671e9, rel=1e-3)
    assert model("qwen3-235b").total_parameters == pytest.approx(235e9, rel=1e-3)


def test_ffn_experts_are_two_thirds_of_what_a_token_chooses() -> None:
    assert CHAT.ffn_experts_a_token == 8
    assert LITE.ffn_experts_a_token == 8
    assert model("deepseek-v3").ffn_experts_a_token == 8


@pytest.mark.parametrize(
    ("name", "form", "size"),
    [
        ("chat", "bf16", 64_512),
        ("chat", "fp8", 36_736),
        ("chat", "fp8-plain", 32_256),
        ("chat", "fp8-snapmla", 36_064),
        ("lite", "bf16", 32_256),
        ("longcat-2.0", "bf16", 87_552),
    ],
)
def test_bytes_of_cache_a_token(name: str, form: str, size: int) -> None:
    assert model(name).cache_bytes_a_token(form) == size


def test_a_layer_that_drafts_caches_one_attention_more() -> None:
    assert CHAT.cache_bytes_a_token(with_mtp=True) == 64_512 + 1_152


def test_weights_are_those_of_the_dry_run() -> None:
    """Tables of docs/dry-run.md and README: 141.9 and 72.0 GB, allocated by vLLM's CUDA build."""
    bf16 = precision("bf16")
    assert weights(CHAT, Layout(8, 1, 8), bf16).total == pytest.approx(141.93e9, rel=1e-4)
    assert weights(CHAT, Layout(16, 1, 16), bf16).total == pytest.approx(71.96e9, rel=1e-4)
    assert weights(CHAT, Layout(8, 1, 8), bf16).total == pytest.approx(141.9e9, rel=1e-3)
    assert weights(CHAT, Layout(16, 1, 16), bf16).total == pytest.approx(72.0e9, rel=1e-3)


def test_without_expert_parallelism_a_rank_has_as_much() -> None:
    split, whole = (weights(CHAT, Layout(8, 1, ep), precision("bf16")).total for ep in (1, 8))
    assert split == whole


def test_published_sizes_of_files() -> None:
    assert checkpoint_bytes(SPARSE, precision("bf16")) == pytest.approx(3.55e12, rel=0.005)
    assert checkpoint_bytes(SPARSE, precision("fp8-all")) == pytest.approx(2051.15e9, rel=0.005)
    assert checkpoint_bytes(SPARSE, precision("fp8")) > 1.01 * 2051.15e9, "so not only its experts are in FP8"
    assert checkpoint_bytes(CHAT, precision("bf16")) == pytest.approx(1124e9, rel=1e-3)


def test_lite_takes_a_gpu() -> None:
    one = Layout()
    assert weights(LITE, one, precision("bf16"), with_mtp=True).total == pytest.approx(137.4e9, rel=1e-3)
    assert weights(LITE, one, precision("fp8"), with_mtp=True).total == pytest.approx(103.6e9, rel=1e-3)
    assert weights(LITE, one, precision("fp8-all"), with_mtp=True).total == pytest.approx(100.9e9, rel=1e-3)


@pytest.mark.parametrize(
    ("machine", "layout", "weights_", "loaded", "room", "tokens"),
    [
        ("H100", Layout(8, 1, 8), "fp8", 74.6, -1.6, 0),
        ("H100", Layout(8, 1, 8), "fp8-all", 71.6, 1.4, 21_600),
        ("H20", Layout(8, 1, 8), "fp8", 74.6, 13.8, 214_000),
        ("H20-141", Layout(8, 1, 8), "fp8", 74.6, 57.1, 885_000),
        ("H200", Layout(8, 1, 8), "fp8", 74.6, 57.1, 885_000),
        ("H200", Layout(1, 8, 8), "fp8", 107.7, 24.0, 372_000),
        ("B200", Layout(1, 8, 8), "fp8", 107.7, 61.3, 951_000),
        ("H200", Layout(8, 1, 8), "bf16", 142.2, -10.5, 0),
        ("B200", Layout(8, 1, 8), "bf16", 142.2, 26.9, 416_000),
        ("H800", Layout(16, 1, 16), "bf16", 72.2, 0.8, 12_000),
        ("H800", Layout(8, 2, 16), "bf16", 74.5, -1.6, 0),
        ("H800", Layout(8, 2, 16), "fp8", 40.7, 32.2, 500_000),
        ("H800", Layout(1, 16, 16), "fp8", 73.9, -0.9, 0),
        ("H800", Layout(1, 16, 16), "fp8-all", 55.7, 17.2, 267_000),
        ("H800", Layout(1, 128, 128), "fp8", 44.3, 28.7, 445_000),
        ("GB200", Layout(4, 4, 16), "bf16", 79.3, 95.5, 1_480_000),
        ("GB200", Layout(1, 64, 64), "bf16", 57.0, 117.8, 1_830_000),
    ],
)
def test_who_fits_where(machine: str, layout: Layout, weights_: str, loaded: float, room: float, tokens: int) -> None:
    """As in docs/plan.md: 0.90 of the memory, 4 GB kept back, the MTP layer loaded."""
    found = memory(CHAT, layout, precision(weights_), gpu(machine).memory_bytes, with_mtp=True)
    assert found.weights.total / 1e9 == pytest.approx(loaded, abs=0.1)
    assert found.room_bytes / 1e9 == pytest.approx(room, abs=0.1)
    assert found.tokens_a_replica == pytest.approx(tokens, rel=0.03)
    assert found.missing_bytes(0) / 1e9 == pytest.approx(max(0.0, -room), abs=0.1)


@pytest.mark.parametrize(("layout", "room"), [(Layout(16, 1, 16), 6.0), (Layout(8, 2, 16), 3.7)])
def test_the_tightest_layouts_have_more_with_a_greater_share(layout: Layout, room: float) -> None:
    size = gpu("H800").memory_bytes
    found = memory(CHAT, layout, precision("bf16"), size, share=0.95, kept_bytes=3e9, with_mtp=True)
    assert found.room_bytes / 1e9 == pytest.approx(room, abs=0.1)


def test_latents_are_on_every_rank_and_heads_are_not() -> None:
    one, eight = (memory(CHAT, Layout(tp, 1, tp), precision("fp8"), 2e12).cache_bytes_a_token for tp in (1, 8))
    assert one == eight
    qwen = model("qwen3-235b")
    one, four = (memory(qwen, Layout(tp, 1, tp), precision("fp8"), 2e12).cache_bytes_a_token for tp in (1, 4))
    assert one == 4 * four


@given(st.sampled_from(["chat", "lite", "longcat-2.0"]), st.sampled_from([1, 2, 4, 8, 16, 32, 64]), st.data())
def test_all_ranks_together_have_at_least_the_whole_model(name: str, gpus: int, data: st.DataObject) -> None:
    known = model(name)
    layout = data.draw(st.sampled_from(list(layouts(known, gpus))))
    form = precision(data.draw(st.sampled_from(["bf16", "fp8", "fp8-all"])))
    alone = weights(known, Layout(), form).total
    assert weights(known, layout, form).total * gpus >= alone * (1 - 1e-9)


@given(st.floats(0.1, 1.0), st.floats(0.1, 1.0))
def test_a_greater_share_never_leaves_less_room(one: float, other: float) -> None:
    low, high = sorted((one, other))
    rooms = [memory(CHAT, Layout(8, 1, 8), precision("fp8"), 141e9, share=share).room_bytes for share in (low, high)]
    assert rooms[0] <= rooms[1]


def test_ranks_that_do_not_divide_the_experts_have_copies() -> None:
    layout = Layout(1, 320, 320)
    assert layout.experts_a_rank(CHAT) == 2
    assert layout.redundant_experts(CHAT) == 128
    assert Layout(1, 128, 128).redundant_experts(CHAT) == 0


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        (Layout(3, 1, 3), "tp: 3 does not divide 64 heads"),
        (Layout(8, 2, 8), "ep: 8, wanted 1 or tp x dp = 16"),
        (Layout(5, 1, 1), "ep: 1 splits experts of 2048 over 5 ranks"),
    ],
)
def test_a_layout_that_does_not_go_is_told(layout: Layout, problem: str) -> None:
    assert any(each.startswith(problem) for each in layout.problems(CHAT))


def test_a_config_of_our_own_is_read_like_a_published_one(tmp_path: Path) -> None:
    config = replace(DEFAULT)
    (tmp_path / "config.json").write_text(json.dumps(spellings.published(config)))
    for text in (str(tmp_path), str(tmp_path / "config.json")):
        found = model(text)
        norms = config.total_parameters - found.total_parameters
        assert 0 < norms < 0.02 * config.total_parameters, "all but norms and the router's bias"
        assert found.cache_bytes_a_token() == config.kv_cache_bytes_per_token()


def test_n_gram_tables_are_read_from_a_config() -> None:
    raw = spellings.published(DEFAULT) | {
        "architectures": ["LongcatFlashNgramForCausalLM"],
        "emb_neighbor_num": 4,
        "emb_split_num": 4,
        "ngram_vocab_size_ratio": 78,
    }
    found = of_config(raw, "lite")
    assert found.tables is not None
    assert (found.tables.count, found.tables.rows) == (12, 78 * DEFAULT.vocab_size)
    with pytest.raises(ValueError, match="emb_split_num or ngram_vocab_size_ratio missing"):
        of_config({name: value for name, value in raw.items() if name != "emb_split_num"}, "lite")


def test_models_that_are_not_longcats_are_refused() -> None:
    with pytest.raises(ValueError, match="does not know; wanted LongCat-Flash or LongCat-Flash-Lite"):
        of_config({"architectures": ["LlamaForCausalLM"]}, "llama")
