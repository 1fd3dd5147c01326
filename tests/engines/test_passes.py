"""An engine whose forward passes are noted for `benchmarks/bench_floor.py`, and whose prompts can be left out."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

from benchmarks.passes import AFTER, MOST_REQUESTS, WARM_UP, Notes, decode_steps, prefill_seconds
from longcat_nano import CHECKPOINT
from tests.harness import engine

STEPS, REQUESTS, PROMPT = 4, 3, 2 * MOST_REQUESTS
NEW_TOKENS = WARM_UP + STEPS + AFTER + 4


def test_passes_are_noted_and_a_prompt_that_is_left_out_is_not_computed(tmp_path: Path) -> None:
    notes = Notes(tmp_path, STEPS, counts_experts=True, times_memory=True, streams=True)
    prompts = [list(range(5 + n, 5 + n + PROMPT)) for n in range(REQUESTS)]
    options = {"dtype": "bfloat16", "prefix_caching": False, "broken": notes.watch}
    with engine.serving(CHECKPOINT, **options) as served:
        notes.taken()
        answers = served.greedy(prompts, NEW_TOKENS)
        computed = notes.taken()
        again = served.greedy(prompts, NEW_TOKENS)
        notes.taken()
        notes.leave_prompts_out()
        without = served.greedy(prompts, NEW_TOKENS)
        left_out = notes.taken()
        notes.compute_prompts()
        served.greedy(prompts[:1], NEW_TOKENS)
        alone = notes.taken()
    assert answers == again != without
    for passes in (computed, left_out):
        assert sum(each.tokens for each in passes if each.tokens > MOST_REQUESTS) == REQUESTS * PROMPT
        seconds, rate, routed = decode_steps(passes, REQUESTS, STEPS)
        assert 0 < seconds < 10
        assert rate is not None
        assert 1e8 < rate < 1e13
        assert routed is not None
        # Nano has 32 FFN experts, and a token takes 6 of 48.
        assert 0 < routed.choices <= 6
        assert routed.choices <= routed.experts <= REQUESTS * routed.choices
    decoding = [each for each in computed if each.tokens == REQUESTS]
    assert [each.routed is None for each in decoding[: WARM_UP + STEPS + 1]] == [
        WARM_UP <= step < WARM_UP + STEPS for step in range(WARM_UP + STEPS + 1)
    ]
    assert [each.routed is None for each in left_out if each.tokens > MOST_REQUESTS] == [True] * sum(
        each.tokens > MOST_REQUESTS for each in left_out
    ), "no layer has run"
    assert all(each.left_out > 0 for each in computed), "what a cache does not hold is read in each layer"
    assert not any(each.left_out for each in left_out if each.tokens > MOST_REQUESTS)
    assert 0 < prefill_seconds(alone) < 10
