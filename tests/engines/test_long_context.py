"""A prompt that fills a long context, its answer, and the answer to what is said next, out of the cache."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

from tests.cases import write_checkpoint
from tests.harness import engine
from tests.long_context import CHUNK, DRAFTS, NEW_TOKENS, config_of, conversation, tensors_of
from tests.oracle import relative_error

CONTEXT = 16384
"""`benchmarks/bench_context.py` does the same at 131,072."""


def test_at_the_end_of_a_long_context_tokens_drafts_and_logits_are_the_references(tmp_path: Path) -> None:
    config = config_of(CONTEXT)
    truth = conversation(CONTEXT)
    directory = write_checkpoint(tmp_path, config, tensors_of(config))
    options = {"max_model_len": CONTEXT, "cache_tokens": 2 * CONTEXT, "chunk": CHUNK}
    with engine.serving(directory, draft_tokens=DRAFTS, **options) as served:
        assert served.speculated([truth.prompt], NEW_TOKENS) == [truth.answer]
        before = served.cached_tokens
        assert served.speculated([truth.next_prompt], NEW_TOKENS) == [truth.next_answer]
        assert served.cached_tokens - before > len(truth.prompt) - 32
        (log_softmax,) = served.greedy_log_softmax([truth.next_prompt], NEW_TOKENS, config.vocab_size)
    assert relative_error(log_softmax, truth.next_log_softmax) < 1e-4
