"""The shipped checkpoint, whose router and drafts have learned something, in the engines."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longcat_core.drafting import gate as drafting
from longcat_core.recipe.conversion import Conversion, Source
from longcat_core.reference import LongcatForCausalLM
from longcat_nano import CHECKPOINT
from tests.harness import engine
from tests.oracle import typical_error

PROMPTS = ("import os\n\n\ndef ", "class Node:\n    def __init__(self, value):\n", "    for name in sorted(")
NEW_TOKENS, DRAFT_TOKENS = 48, 3
TEXT = """class Node:
    def __init__(self, value, children=None):
        self.value = value
        self.children = []
"""


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


@torch.no_grad()
def test_nano_in_fp8_as_longcat_quantize_writes_it(tmp_path: Path) -> None:
    """Its sizes are no whole blocks. Beside it the bf16 checkpoint, for what bf16 activations cost."""
    from tokenizers import Tokenizer

    source = Source(CHECKPOINT)
    (tmp_path / "fp8").mkdir()
    Conversion(source, kept=set(), mtp_in_fp8=True).write(tmp_path / "fp8")
    tokens = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode(TEXT).ids
    errors = {}
    for directory in (tmp_path / "fp8", CHECKPOINT):
        model = LongcatForCausalLM.from_checkpoint(directory).float()
        exact = model(torch.tensor([tokens]))[0][0, :-1].log_softmax(dim=-1)
        with engine.serving(directory, dtype="bfloat16") as served:
            errors[directory] = typical_error(served.log_softmax(tokens, source.config.vocab_size), exact)
    assert errors[tmp_path / "fp8"] <= 1.5 * errors[CHECKPOINT]
