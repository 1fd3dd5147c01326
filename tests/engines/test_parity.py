"""An engine's tokens and logits are transformers', whatever the shape of the model and the spelling of its config."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longcat_core.config import LongcatConfig
from tests.cases import CASES, DEFAULT, Case, every_spelling, in_dtype, write_checkpoint
from tests.harness import engine
from tests.oracle import assert_greedy_equal, greedy, oracle, oracle_logits, relative_error, typical_error

LENGTHS = (1, 7, 33)


def prompts_of(case: Case) -> list[list[int]]:
    return [case.prompts(1, length, seed=length)[0] for length in LENGTHS]


def assert_parity(case: Case, directory: Path, **engine_args: object) -> None:
    """Logits within 1e-4 relative of the oracle's, and its greedy tokens, in fp32."""
    truth = oracle(case.config, case.published())
    prompts = prompts_of(case)
    with engine.serving(directory, **engine_args) as served:
        tokens = served.greedy(prompts, 12)
        ours = served.log_softmax(prompts[-1], case.config.vocab_size)
    theirs = oracle_logits(truth, torch.tensor([prompts[-1]]))[0, :-1].log_softmax(dim=-1)
    assert relative_error(ours, theirs) < 1e-4
    for prompt, continuation in zip(prompts, tokens, strict=True):
        assert_greedy_equal(continuation, greedy(truth, prompt, 12))


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_logits_are_transformers(name: str, checkpoint_of: Callable[[Case], Path]) -> None:
    assert_parity(CASES[name], checkpoint_of(CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_read_as_it_was_written(name: str, checkpoint_of: Callable[[Case], Path]) -> None:
    assert engine.configure(checkpoint_of(CASES[name])) == CASES[name].config


@pytest.mark.parametrize("spelling", every_spelling(DEFAULT))
def test_the_same_model_is_read_from_every_spelling_of_the_config(spelling: str, tmp_path: Path) -> None:
    case = CASES["default"]
    directory = write_checkpoint(tmp_path, case.config, case.published(), every_spelling(case.config)[spelling])
    assert engine.configure(directory) == case.config


@pytest.mark.parametrize("spelling", ["num_hidden_layers_only", "transformers_names"])
def test_the_spellings_furthest_apart_give_the_same_tokens(spelling: str, tmp_path: Path) -> None:
    case = CASES["default"]
    directory = write_checkpoint(tmp_path, case.config, case.published(), every_spelling(case.config)[spelling])
    truth = oracle(case.config, case.published())
    prompt = case.prompts(1, 20)[0]
    with engine.serving(directory) as served:
        (tokens,) = served.greedy([prompt], 8)
    assert_greedy_equal(tokens, greedy(truth, prompt, 8))


@st.composite
def configs(draw: st.DrawFn) -> LongcatConfig:
    """Models of any shape: nothing is a multiple of anything it need not be."""
    routed, zero = draw(st.integers(2, 9)), draw(st.integers(0, 7))
    return replace(
        DEFAULT,
        vocab_size=draw(st.integers(270, 330)),
        hidden_size=draw(st.integers(5, 20)) * 8,
        num_layers=draw(st.integers(1, 2)),
        num_attention_heads=draw(st.integers(1, 5)),
        q_lora_rank=draw(st.integers(2, 9)) * 8,
        kv_lora_rank=draw(st.integers(2, 9)) * 8,
        qk_nope_head_dim=draw(st.integers(1, 5)) * 8,
        qk_rope_head_dim=draw(st.integers(1, 5)) * 4,
        v_head_dim=draw(st.integers(1, 5)) * 8,
        ffn_hidden_size=draw(st.integers(2, 12)) * 8,
        expert_ffn_hidden_size=draw(st.integers(1, 9)) * 8,
        n_routed_experts=routed,
        zero_expert_num=zero,
        moe_topk=draw(st.integers(2, routed + zero)),  # transformers fails on one token with a top-k of 1
        tie_word_embeddings=draw(st.booleans()),
    )


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(configs())
def test_models_of_any_shape_have_transformers_tokens(config: LongcatConfig) -> None:
    case = Case(config)
    with tempfile.TemporaryDirectory() as directory:
        assert_parity(case, write_checkpoint(Path(directory), config, case.published()))


@pytest.mark.parametrize("name", ["default", "latent_512_rope_64", "hidden_72"])
def test_bf16_is_no_further_off_than_twice_transformers_own(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    rounded = in_dtype(case.published(), torch.bfloat16)
    directory = write_checkpoint(tmp_path, case.config, rounded)
    prompt = case.prompts(1, 64)[0]
    ids = torch.tensor([prompt])
    exact, theirs = (
        oracle_logits(oracle(case.config, rounded, dtype), ids)[0, :-1].log_softmax(dim=-1)
        for dtype in (torch.float32, torch.bfloat16)
    )
    with engine.serving(directory, dtype="bfloat16") as served:
        ours = served.log_softmax(prompt, case.config.vocab_size)
    assert typical_error(ours, exact) <= 2 * typical_error(theirs, exact)


def test_a_checkpoint_in_bf16_is_as_exact_in_fp32(tmp_path: Path) -> None:
    """Nothing that follows from the weights is rounded to the checkpoint's dtype again."""
    case = CASES["hidden_72"]
    rounded = in_dtype(case.published(), torch.bfloat16)
    prompt = case.prompts(1, 64)[0]
    exact = oracle_logits(oracle(case.config, rounded, torch.float32), torch.tensor([prompt]))[0, :-1]
    with engine.serving(write_checkpoint(tmp_path, case.config, rounded), dtype="float32") as served:
        ours = served.log_softmax(prompt, case.config.vocab_size)
    assert relative_error(ours, exact.log_softmax(dim=-1)) < 1e-4


@pytest.mark.parametrize("scale", ["mla_scale_q_lora", "mla_scale_kv_lora"])
def test_an_mla_scale_that_is_off_is_left_out(scale: str, tmp_path: Path) -> None:
    """transformers cannot turn a scale off, so the reference is the truth here."""
    from longcat_core.reference import LongcatForCausalLM

    case = Case(replace(DEFAULT, **{scale: False}))
    directory = write_checkpoint(tmp_path, case.config, case.published())
    prompt = case.prompts(1, 20)[0]
    with engine.serving(directory) as served:
        ours = served.log_softmax(prompt, case.config.vocab_size)
    with torch.no_grad():
        logits, _, _ = LongcatForCausalLM.from_checkpoint(directory)(torch.tensor([prompt]))
    assert relative_error(ours, logits[0, :-1].log_softmax(dim=-1)) < 1e-4
