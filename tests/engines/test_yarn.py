"""YaRN in every spelling, and contexts longer than the one it starts from: as transformers has them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat_core.config import LongcatConfig, RopeConfig
from longcat_core.layers import rotary
from longcat_core.reference import LongcatForCausalLM
from tests.cases import DEFAULT, Case, every_spelling, write_checkpoint
from tests.core.test_rotary import ROPES
from tests.harness import engine
from tests.oracle import Greedy, assert_greedy_equal, oracle, oracle_logits, relative_error

CONTEXT, START = 4096, 512
YARN = RopeConfig(
    theta=1e4, factor=8.0, original_max_position_embeddings=START, beta_fast=16.0, mscale=1.0, mscale_all_dim=0.8
)
CASE = Case(replace(DEFAULT, num_layers=1, num_attention_heads=2, max_position_embeddings=CONTEXT, rope=YARN))
PROMPTS = [CASE.prompts(1, length, seed=length)[0] for length in (START - 4, 1500, 3000)]
NEW_TOKENS, CHUNK = 8, 256


@pytest.mark.parametrize("rope", ROPES)
def test_an_engine_reads_every_spelling_of_yarn_alike(rope: str, tmp_path: Path) -> None:
    config = replace(DEFAULT, rope=ROPES[rope], max_position_embeddings=16384)
    written = every_spelling(config)
    chosen = {name: written[name] for name in ("published", "rope_scaling_type", "transformers_names")}
    if config.rope.is_yarn:
        scaling = written["published"]["rope_scaling"]
        chosen["deepseek_yarn"] = written["published"] | {"rope_scaling": {**scaling, "rope_type": "deepseek_yarn"}}
        length = "original_max_position_embeddings"
        rest = {key: value for key, value in scaling.items() if key != length}
        chosen["length_beside_it"] = written["published"] | {"rope_scaling": rest, length: scaling[length]}
    for name, raw in chosen.items():
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert engine.configure(tmp_path, load_format="dummy") == config, name


def test_beyond_the_context_that_yarn_starts_from_tokens_and_logits_are_transformers(tmp_path: Path) -> None:
    """The first prompt passes it while its answer is generated; the others come in chunks."""
    truth = oracle(CASE.config, CASE.published())
    directory = write_checkpoint(tmp_path, CASE.config, CASE.published())
    with engine.serving(directory, chunk=CHUNK, max_model_len=CONTEXT, cache_tokens=2 * CONTEXT) as served:
        assert served.largest_chunk() == CHUNK
        tokens = served.greedy(PROMPTS, NEW_TOKENS)
        of_answers = served.greedy_log_softmax(PROMPTS, NEW_TOKENS, CASE.config.vocab_size)
        of_a_prompt = served.log_softmax(PROMPTS[1], CASE.config.vocab_size)
    for prompt, answer, ours in zip(PROMPTS, tokens, of_answers, strict=True):
        theirs = oracle_logits(truth, torch.tensor([prompt + answer]))[0, :-1]
        best = theirs[-NEW_TOKENS:].topk(2)
        margins = (best.values[:, 0] - best.values[:, 1]).tolist()
        choices = list(map(Greedy, best.indices[:, 0].tolist(), margins))
        assert assert_greedy_equal(answer, choices) == NEW_TOKENS, "all choices are clear"
        assert relative_error(ours, theirs[-NEW_TOKENS:].log_softmax(dim=-1)) < 1e-4
        if prompt == PROMPTS[1]:
            theirs = theirs[: len(of_a_prompt)].log_softmax(dim=-1)
            assert relative_error(of_a_prompt[START:], theirs[START:]) < 1e-4


@torch.no_grad()
def logits_beyond(config: LongcatConfig) -> Tensor:
    """Of the case's weights, at the positions beyond the context that YaRN starts from."""
    model = LongcatForCausalLM(config)
    model.load_published(CASE.published())
    return model(torch.tensor([PROMPTS[1]]))[0][0, START:]


@pytest.mark.parametrize(
    "rope",
    [RopeConfig(theta=YARN.theta), replace(YARN, mscale_all_dim=0.0, attention_factor=rotary.attention_factor(YARN))],
    ids=["without YaRN", "without its factor on the softmax"],
)
def test_these_logits_are_others_without_a_part_of_yarn(rope: RopeConfig) -> None:
    """So parity with transformers fails in an engine that leaves it out."""
    assert relative_error(logits_beyond(replace(CASE.config, rope=rope)), logits_beyond(CASE.config)) > 1e-2
