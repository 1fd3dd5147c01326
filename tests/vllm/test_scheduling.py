"""What vLLM does beside what `tests/engines/test_scheduling.py` asks of both engines."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.cases import CASES, Case
from tests.engines.test_scheduling import CASE, NEW_TOKENS, assert_true
from tests.oracle import assert_greedy_equal, greedy, oracle
from tests.vllm.engine import serving


def test_torch_compile(checkpoint_of: Callable[[Case], Path]) -> None:
    with serving(checkpoint_of(CASE), enforce_eager=False) as served:
        assert_true(served)


def test_pipeline_parallel(checkpoint_of: Callable[[Case], Path]) -> None:
    """With torch.compile: vLLM's CPU worker asserts in eager mode (facts of 0.32)."""
    ranks = {"pipeline_parallel_size": 2, "enforce_eager": False}
    with serving(checkpoint_of(CASE), **ranks) as served:
        assert_true(served)


def test_expert_parallel_with_an_odd_number_of_experts(checkpoint_of: Callable[[Case], Path]) -> None:
    case = Case(replace(CASES["default"].config, n_routed_experts=7, zero_expert_num=5))
    prompt = case.prompts(1, 24)[0]
    """With the filter by which a rank reads its own experts only, so that the others' are not missed."""
    with serving(checkpoint_of(case), tensor_parallel=2, expert_parallel=True, enable_ep_weight_filter=True) as served:
        tokens = served.greedy([prompt], NEW_TOKENS)[0]
    assert_greedy_equal(tokens, greedy(oracle(case.config, case.published()), prompt, NEW_TOKENS))
