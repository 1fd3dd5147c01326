"""Whatever vLLM does to the batch or spreads over ranks, the tokens stay the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.cases import CASES, Case
from tests.oracle import Greedy, assert_greedy_equal, greedy, oracle
from tests.vllm.engine import Engine, serving

CASE = CASES["default"]
NEW_TOKENS = 16
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


def assert_true(engine: Engine) -> None:
    for tokens, wanted in zip(engine.greedy(prompts(), NEW_TOKENS), truth(), strict=True):
        assert_greedy_equal(tokens, wanted)


@pytest.fixture
def directory(checkpoint_of: Callable[[Case], Path]) -> Path:
    return checkpoint_of(CASE)


def test_prompts_in_chunks_of_16_tokens(directory: Path) -> None:
    with serving(directory, max_num_batched_tokens=16, enable_prefix_caching=False) as engine:
        scheduler = engine.llm.llm_engine.vllm_config.scheduler_config
        assert scheduler.enable_chunked_prefill
        assert scheduler.max_num_batched_tokens == 16
        assert_true(engine)


@pytest.mark.parametrize("block_size", [1, 7, 8, 32])
def test_prefix_cache_hits_with_any_block_size(directory: Path, block_size: int) -> None:
    with serving(directory, block_size=block_size) as engine:
        assert_true(engine)
        before = engine.metric("vllm:prefix_cache_hits")
        assert_true(engine)
        assert engine.metric("vllm:prefix_cache_hits") - before >= 64


def test_one_request_at_a_time(directory: Path) -> None:
    with serving(directory, max_num_seqs=1) as engine:
        assert_true(engine)


def test_preemption_under_a_small_cache(directory: Path) -> None:
    with serving(directory, num_gpu_blocks_override=18, block_size=8, max_model_len=128) as engine:
        assert_true(engine)
        assert engine.metric("vllm:num_preemptions") > 0


def test_bf16_batches_have_the_tokens_of_single_requests_where_the_choice_is_clear(directory: Path) -> None:
    """bf16 cannot be compared token for token with fp32, but the batch must not matter more than rounding does."""
    with serving(directory, dtype="bfloat16") as engine:
        batched = engine.greedy(prompts(), 4)
        alone = [engine.greedy([prompt], 4)[0] for prompt in prompts()]
    assert sum(a == b for a, b in zip(batched, alone, strict=True)) >= len(alone) - 1


def test_torch_compile(directory: Path) -> None:
    with serving(directory, enforce_eager=False) as engine:
        assert_true(engine)


@pytest.mark.usefixtures("two_ranks_on_few_cores")
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_tensor_parallel_with_and_without_expert_parallel(directory: Path, expert_parallel: bool) -> None:
    with serving(directory, tensor_parallel_size=2, enable_expert_parallel=expert_parallel) as engine:
        assert_true(engine)


@pytest.mark.usefixtures("two_ranks_on_few_cores")
def test_expert_parallel_with_an_odd_number_of_experts(checkpoint_of: Callable[[Case], Path]) -> None:
    from dataclasses import replace

    case = Case(replace(CASE.config, n_routed_experts=7, zero_expert_num=5))
    model = oracle(case.config, case.published())
    prompt = case.prompts(1, 24)[0]
    with serving(checkpoint_of(case), tensor_parallel_size=2, enable_expert_parallel=True) as engine:
        assert_greedy_equal(engine.greedy([prompt], NEW_TOKENS)[0], greedy(model, prompt, NEW_TOKENS))


@pytest.mark.usefixtures("two_ranks_on_few_cores")
def test_pipeline_parallel(directory: Path) -> None:
    """With torch.compile: vLLM's CPU worker asserts in eager mode (facts of 0.32)."""
    with serving(directory, pipeline_parallel_size=2, enforce_eager=False) as engine:
        assert_true(engine)
