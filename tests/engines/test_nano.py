"""The shipped checkpoint, whose router and drafts have learned something, in the engines."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from longcat_core.drafting import gate as drafting
from longcat_core.reference import LongcatForCausalLM
from longcat_nano import CHECKPOINT
from tests.harness import engine

PROMPTS = ("import os\n\n\ndef ", "class Node:\n    def __init__(self, value):\n", "    for name in sorted(")
NEW_TOKENS, DRAFT_TOKENS = 48, 3


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


@torch.no_grad()
def test_nanos_tokens_and_accepted_drafts_are_the_references(prompts: list[list[int]]) -> None:
    model = LongcatForCausalLM.from_checkpoint(CHECKPOINT)
    gate = drafting.load(CHECKPOINT)
    assert gate is not None
    with engine.serving(CHECKPOINT, draft_tokens=DRAFT_TOKENS, **engine.GATED) as served:
        answers = served.speculated(prompts, NEW_TOKENS)
    for prompt, answer in zip(prompts, answers, strict=True):
        continuation = model.generate(prompt, NEW_TOKENS + DRAFT_TOKENS)
        chains = drafting.draft_chains(model, prompt, continuation, DRAFT_TOKENS)
        steps = drafting.walk(chains.accepted, gate.kept(chains.features))
        accepted = [min(s.accepted, NEW_TOKENS - 2 - s.position) for s in steps if s.position + 1 < NEW_TOKENS]
        assert answer.tokens == continuation[:NEW_TOKENS]
        assert answer.accepted == accepted
