"""Whatever an engine does to the batch or spreads over ranks, tokens and logits stay the same."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cases import CASES, Case
from tests.collectives import noted
from tests.harness import ENGINE, engine
from tests.oracle import CLEAR_MARGIN, Greedy, assert_greedy_equal, greedy, oracle, oracle_logits, relative_error

CASE = CASES["default"]
NEW_TOKENS, LOGITS = 16, 4
LENGTHS = (1, 3, 16, 17, 40, 64, 90)


@cache
def prompts() -> list[list[int]]:
    """Mixed lengths; the last two share their first 64 tokens with the one before."""
    mixed = [CASE.prompts(1, length, seed=length)[0] for length in LENGTHS]
    return [*mixed, mixed[-1][:64] + mixed[0] * 5, mixed[-1][:64] + mixed[1] * 3]


@cache
def truth() -> list[list[Greedy]]:
    model = oracle(CASE.config, CASE.published())
    return [greedy(model, prompt, NEW_TOKENS) for prompt in prompts()]


def assert_true(served: engine.Engine) -> None:
    """The oracle's tokens, and its logits at the first of some prompts."""
    answers = served.greedy(prompts(), NEW_TOKENS)
    for tokens, wanted in zip(answers, truth(), strict=True):
        assert_greedy_equal(tokens, wanted)
    some = prompts()[2::3]  # engines make an object of every number
    for prompt, ours in zip(some, served.greedy_log_softmax(some, LOGITS, CASE.config.vocab_size), strict=True):
        assert relative_error(ours, theirs(tuple(prompt))) < 1e-4


@cache
def theirs(prompt: tuple[int, ...]) -> Tensor:
    """The oracle's log-softmax along its continuation, whose choices are clear: fp32 [LOGITS, vocabulary]."""
    model = oracle(CASE.config, CASE.published())
    choices = truth()[prompts().index(list(prompt))][:LOGITS]
    assert all(choice.margin > CLEAR_MARGIN for choice in choices)
    whole = [*prompt, *(choice.token for choice in choices)]
    return oracle_logits(model, torch.tensor([whole]))[0, len(prompt) - 1 : -1].log_softmax(dim=-1)


@pytest.fixture
def directory(checkpoint_of: Callable[[Case], Path]) -> Path:
    return checkpoint_of(CASE)


def test_prompts_in_chunks_of_16_tokens(directory: Path) -> None:
    with engine.serving(directory, chunk=16, prefix_caching=False) as served:
        assert_true(served)
        assert served.largest_chunk() == 16


@pytest.mark.parametrize("block_size", [1, 7, 8, 32] if ENGINE == "vllm" else [1])  # SGLang's larger ones need Triton
def test_prefix_cache_hits_with_any_block_size(block_size: int, directory: Path) -> None:
    with engine.serving(directory, block_size=block_size) as served:
        assert_true(served)
        before = served.cached_tokens
        assert_true(served)
        assert served.cached_tokens - before >= 64


def test_one_request_at_a_time(directory: Path) -> None:
    with engine.serving(directory, max_running=1) as served:
        assert_true(served)


def test_preemption_under_a_small_cache(directory: Path) -> None:
    with engine.serving(directory, cache_tokens=144, block_size=8 if ENGINE == "vllm" else None) as served:
        assert_true(served)
        assert served.preemptions > 0


def test_bf16_batches_have_the_tokens_of_single_requests_where_the_choice_is_clear(directory: Path) -> None:
    """bf16 cannot be compared token for token with fp32, but the batch must not matter more than rounding does."""
    with engine.serving(directory, dtype="bfloat16") as served:
        batched = served.greedy(prompts(), 4)
        alone = [served.greedy([prompt], 4)[0] for prompt in prompts()]
    assert sum(a == b for a, b in zip(batched, alone, strict=True)) >= len(alone) - 1


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_two_ranks_are_as_one_and_make_four_sums_a_layer_each_for_a_norm(
    expert_parallel: bool, directory: Path, tmp_path: Path
) -> None:
    """Of either attention and of either dense FFN, the second with the experts'; one more is of the embedding. A norm
    reads each of a layer's as it is, which an engine can do in the kernel that makes the sum."""
    notes, sums = tmp_path / "notes", 4 * CASE.config.num_layers
    parallel = {"tensor_parallel": 2, "expert_parallel": expert_parallel}
    with engine.serving(directory, **parallel, **engine.noting_collectives(notes)) as served:
        assert_true(served)
    assert noted(notes)
    for each in noted(notes):
        assert each.collectives == {"all_reduce": sums + 1}
        assert each.sums_into_a_norm >= sums


@pytest.mark.by_hand
def test_four_ranks_with_two_experts_each_are_as_one(directory: Path) -> None:
    """Of two ranks each is the first or the last."""
    with engine.serving(directory, tensor_parallel=4, expert_parallel=True) as served:
        assert_true(served)
