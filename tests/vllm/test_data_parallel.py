"""Data-parallel ranks that share experts on a CPU: one rank's tokens, and the dense path in the exchange's time."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from longcat_core.kernels.cpu import library
from longcat_core.parallel.location import PLACES
from longcat_core.parallel.schedule import SERIAL, SHORTCUT_LAYER, SINGLE_BATCH, Schedule, Stage, faults
from longcat_core.quantization import Quantization
from longcat_nano import CHECKPOINT
from tests.cases import CASES, Case
from tests.fp8 import Release
from tests.oracle import assert_greedy_equal, greedy, oracle
from tests.vllm.data_parallel import Answer, Product, answers

CASE = CASES["odd_counts"]  # 7 experts, of which one rank has 4
NEW_TOKENS = 8
OFF = {"additional_config": {"longcat": {"overlap": False}}}

CONFIG = CASE.config
QUERIES: Product = (CONFIG.q_lora_rank, CONFIG.num_attention_heads * CONFIG.qk_head_dim)
OUTPUT: Product = (CONFIG.num_attention_heads * CONFIG.v_head_dim, CONFIG.hidden_size)
ROUTER: Product = (CONFIG.hidden_size, CONFIG.num_experts)
DOWN: Product = (CONFIG.ffn_hidden_size, CONFIG.hidden_size)
NAMES: dict[str | Product, tuple[str, ...]] = {
    QUERIES: ("attention_{}_qkv",),
    "vllm::unified_mla_attention_with_output": ("attention_{}_core",),
    OUTPUT: ("attention_{}_output", "attention_{}_sum"),
    ROUTER: ("router",),
    DOWN: ("dense_ffn_{}", "dense_ffn_{}_sum"),
    "longcat::exchange_begin": ("dispatch",),
    "longcat::exchange_compute": ("experts", "identity"),
    "longcat::exchange_end": ("combine",),
}
"""Operations of `SHORTCUT_LAYER`. A sum over one rank is nothing, and takes the place where it would be; so does the
identity, which inductor fuses into others."""


def layers_of(operations: Sequence[str | Product]) -> list[list[str]]:
    """The operations of each layer in the order in which they ran, those of which it has two numbered."""
    layers: list[list[str]] = []
    for operation in operations:
        key = operation if isinstance(operation, str) else (operation[0], operation[1])
        for name in NAMES.get(key, ()):
            if name == "attention_{}_qkv" and (not layers or "attention_1_qkv" in layers[-1]):
                layers.append([])
            numbered = name.format(int(name.format(0) in layers[-1]))
            if numbered != "dense_ffn_1_sum":  # which is the layer's
                layers[-1].append(numbered)
    return [[*layer, "final_sum"] for layer in layers]


def faults_of(layer: Sequence[str]) -> list[str]:
    return list(faults(Schedule("seen", (Stage("layer", (tuple(layer),)),)), SHORTCUT_LAYER))


def stages(layer: Sequence[str], schedule: Schedule) -> list[int]:
    """The number of the stage that each operation belongs to. Of a transfer it is seen when its stage begins, or when
    that ends."""
    numbers = {name: number for number, stage in enumerate(schedule.stages) for name in stage.operations}
    return [numbers[name] for name in layer]


def assert_true(each: Sequence[Answer], prompts: Sequence[list[list[int]]], case: Case = CASE) -> None:
    truth = oracle(case.config, case.published())
    for answer, asked in zip(each, prompts, strict=True):
        for prompt, tokens in zip(asked, answer.tokens, strict=True):
            assert_greedy_equal(tokens, greedy(truth, prompt, NEW_TOKENS))


@pytest.mark.parametrize("enforce_eager", [True, False])
def test_ranks_have_the_tokens_of_one_and_run_the_schedule_of_the_report(
    enforce_eager: bool, checkpoint_of: Callable[[Case], Path], tmp_path: Path
) -> None:
    """Tokens are on their way while the dense path runs, in what torch.compile makes of the layer as well."""
    prompts = [CASE.prompts(3, 9), [*CASE.prompts(1, 2), *CASE.prompts(1, 30, seed=1)]]
    each = answers(checkpoint_of(CASE), tmp_path / "ranks", prompts, NEW_TOKENS, enforce_eager=enforce_eager)
    assert_true(each, prompts)
    for answer in each:
        assert answer.sent_bytes > 0
        layers = layers_of(answer.operations)
        assert len(layers) == CONFIG.num_layers
        for layer in layers:
            assert faults_of(layer) == []
            assert stages(layer, SINGLE_BATCH) == sorted(stages(layer, SINGLE_BATCH))
            assert layer.index("dispatch") < layer.index("dense_ffn_0")
            assert layer.index("combine") > layer.index("dense_ffn_1")


@pytest.mark.parametrize("enforce_eager", [True, False])
def test_without_overlap_they_have_them_too_and_a_rank_may_have_no_request(
    enforce_eager: bool, checkpoint_of: Callable[[Case], Path], tmp_path: Path
) -> None:
    prompts: list[list[list[int]]] = [CASE.prompts(2, 12), []]
    each = answers(checkpoint_of(CASE), tmp_path / "ranks", prompts, NEW_TOKENS, enforce_eager=enforce_eager, **OFF)
    assert_true(each, prompts)
    layers = layers_of(each[0].operations)
    assert len(layers) == CONFIG.num_layers
    for layer in layers:
        assert faults_of(layer) == []
        assert layer.index("combine") < layer.index("dense_ffn_0")
        assert stages(layer, SERIAL) == sorted(stages(layer, SERIAL))


def test_they_have_them_with_an_expert_on_both_ranks(checkpoint_of: Callable[[Case], Path], tmp_path: Path) -> None:
    """Seven experts in eight places."""
    places = json.dumps({PLACES: [[6, 5, 4, 3, 2, 1, 0, 6], [0, 2, 4, 6, 1, 3, 0, 5]]})
    prompts = [CASE.prompts(2, 12), CASE.prompts(1, 30, seed=1)]
    asked = {"additional_config": {"longcat": {"init_expert_location": places}}}
    each = answers(checkpoint_of(CASE), tmp_path / "ranks", prompts, NEW_TOKENS, enforce_eager=False, **asked)
    assert_true(each, prompts)
    assert all(answer.sent_bytes > 0 for answer in each)


@pytest.mark.by_hand
def test_two_pairs_of_ranks_that_share_experts_have_the_tokens_of_one_rank(
    checkpoint_of: Callable[[Case], Path], tmp_path: Path
) -> None:
    """Both of a pair have the same tokens, and send a share of them each. The prompts' lengths are odd and even."""
    case = CASES["default"]
    prompts = [case.prompts(3, 9), [*case.prompts(1, 2), *case.prompts(1, 30, seed=1)]]
    options = {"tensor_parallel": 2, "enforce_eager": True}
    each = answers(checkpoint_of(case), tmp_path / "ranks", prompts, NEW_TOKENS, **options)
    assert_true(each, prompts, case)
    assert all(answer.sent_bytes > 0 for answer in each)


@pytest.mark.by_hand
@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize("quantization", [None, Quantization("fp8")], ids=["bf16", "FP8"])
def test_in_bf16_and_fp8_ranks_choose_what_is_clear(
    quantization: Quantization | None, enforce_eager: bool, tmp_path: Path
) -> None:
    release, case = Release(quantization), CASES["default"]  # of as many tokens
    prompts = [case.prompts(3, 9), [*case.prompts(1, 2), *case.prompts(1, 30, seed=1)]]
    checkpoint, options = release.write(tmp_path / "release"), {"dtype": "bfloat16", "enforce_eager": enforce_eager}
    each = answers(checkpoint, tmp_path / "ranks", prompts, NEW_TOKENS, **options)
    for answer, asked in zip(each, prompts, strict=True):
        release.assert_chooses_what_is_clear(answer.tokens, asked)
        assert answer.sent_bytes > 0


@pytest.mark.skipif(not library.is_available(), reason=library.description())
def test_drafts_beside_a_rank_without_requests_come_to_an_end(tmp_path: Path) -> None:
    """vLLM's ranks wait for each other in every pass of the drafter, so none may make fewer than another."""
    prompts: list[list[list[int]]] = [[list(range(5, 45)), list(range(60, 90))], []]
    options = {"dtype": "bfloat16", "draft_tokens": 3, "enforce_eager": True}
    busy, idle = answers(CHECKPOINT, tmp_path / "ranks", prompts, 12, **options)
    assert [len(tokens) for tokens in busy.tokens] == [12, 12]
    assert idle.tokens == []
