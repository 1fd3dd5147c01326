"""On an NVIDIA GPU: the engines' MLA backends and MoE kernels, with the graphs that the stock command has on."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longcat_core.config import RopeConfig
from longcat_core.quantization import Quantization
from tests.cases import DEFAULT, Case, drafting_tensors, in_dtype, write_checkpoint
from tests.fp8 import dequantised, released
from tests.harness import engine
from tests.oracle import oracle, oracle_logits, typical_error
from tests.speculation import steps_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

# The attention sizes of every published LongCat-Flash, which are those that MLA kernels are built for.
PUBLISHED = replace(
    DEFAULT, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, num_attention_heads=16
)
YARN = RopeConfig(theta=1e4, factor=4.0, original_max_position_embeddings=128, mscale=1.0, mscale_all_dim=0.8)
CASES = {
    "published_attention": Case(PUBLISHED),
    "hidden_200": Case(replace(PUBLISHED, hidden_size=200)),
    "odd_experts": Case(replace(PUBLISHED, n_routed_experts=7, zero_expert_num=5, moe_topk=3)),
    "topk_beyond_ffn_experts": Case(replace(PUBLISHED, n_routed_experts=3, zero_expert_num=9, moe_topk=6)),
    "no_zero_experts": Case(replace(PUBLISHED, zero_expert_num=0)),
    "all_choices_zero_experts": Case(replace(PUBLISHED, zero_expert_num=6), zero_bias=0.25),
    "tied_head": Case(replace(PUBLISHED, tie_word_embeddings=True)),
    "yarn": Case(replace(PUBLISHED, rope=replace(YARN, mscale=0.0, mscale_all_dim=0.0))),
    "yarn_mscale_all_dim": Case(replace(PUBLISHED, rope=YARN)),
    "yarn_attention_factor": Case(replace(PUBLISHED, rope=replace(YARN, attention_factor=1.3))),
}
CASE = CASES["published_attention"]
# Every layer is of whole blocks, but `kv_a_proj_with_mqa`, as published.
FP8 = replace(
    PUBLISHED,
    hidden_size=256,
    q_lora_rank=128,
    ffn_hidden_size=256,
    expert_ffn_hidden_size=256,
    quantization=Quantization("fp8"),
)
DECODED = 32


@cache
def rounded(case: Case) -> dict[str, Tensor]:
    """As the checkpoint has them."""
    if case.config.quantization is not None:
        return released(case.config, case.published())
    return in_dtype(case.published(), torch.bfloat16)


def log_softmax(case: Case, tokens: list[int], dtype: torch.dtype) -> Tensor:
    """transformers' at every position that has a successor."""
    tensors = rounded(case) if case.config.quantization is None else dequantised(rounded(case))
    logits = oracle_logits(oracle(replace(case.config, quantization=None), tensors, dtype), torch.tensor([tokens]))
    return logits[0, :-1].log_softmax(dim=-1)


def assert_as_exact_as_transformers(case: Case, tokens: list[int], ours: Tensor, allowance: float = 2.0) -> None:
    """ours: log-softmax at the last positions of `tokens`, as many as there are."""
    exact, theirs = (log_softmax(case, tokens, dtype)[-len(ours) :] for dtype in (torch.float32, torch.bfloat16))
    assert typical_error(ours, exact) <= allowance * typical_error(theirs, exact)


def assert_prefill_and_decode(case: Case, directory: Path, allowance: float = 2.0, **engine_args: Any) -> None:
    """A prompt of 64 tokens, and 32 that are decoded after it: through graphs, one step each."""
    prompt = case.prompts(1, 64)[0]
    arguments = {"dtype": "bfloat16", **engine.AS_THE_STOCK_COMMAND, **engine_args}
    with engine.serving(write_checkpoint(directory, case.config, rounded(case)), **arguments) as served:
        prefill = served.log_softmax(prompt, case.config.vocab_size)
        (tokens,) = served.greedy([prompt], DECODED)
        (decode,) = served.greedy_log_softmax([prompt], DECODED, case.config.vocab_size)
    assert_as_exact_as_transformers(case, prompt, prefill, allowance)
    assert_as_exact_as_transformers(case, [*prompt, *tokens], decode, allowance)


@pytest.mark.parametrize("name", CASES)
def test_bf16_on_a_gpu_is_no_further_off_than_twice_transformers_own(name: str, tmp_path: Path) -> None:
    assert_prefill_and_decode(CASES[name], tmp_path)


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_two_gpus_as_well(expert_parallel: bool, tmp_path: Path) -> None:
    assert_prefill_and_decode(CASE, tmp_path, tensor_parallel=2, expert_parallel=expert_parallel)


def test_a_cache_in_fp8_costs_what_its_rounding_costs(tmp_path: Path) -> None:
    """e4m3 has 3 bits of mantissa where bf16 has 7."""
    assert_prefill_and_decode(CASE, tmp_path, allowance=16.0, kv_cache_dtype=engine.FP8_CACHE)


@pytest.mark.parametrize("ignored", [(), ("model.layers.0.self_attn.1", "model.layers.1.mlps.0.down_proj")])
def test_weights_in_fp8_cost_what_rounding_activations_to_fp8_costs(ignored: tuple[str, ...], tmp_path: Path) -> None:
    """A GPU multiplies FP8 by FP8: activations are rounded to e4m3, 128 of them to one scale."""
    config = replace(FP8, quantization=Quantization("fp8", ignored=ignored))
    assert_prefill_and_decode(Case(config), tmp_path, allowance=16.0)


@pytest.mark.parametrize("draft_tokens", [1, 3])
def test_drafts_are_the_references_but_for_what_bf16_turns(draft_tokens: int, tmp_path: Path) -> None:
    case, prompt = CASE, CASE.prompts(1, 40)[0]
    tensors = in_dtype(drafting_tensors(case.config), torch.bfloat16)
    arguments = {"dtype": "bfloat16", "draft_tokens": draft_tokens, **engine.AS_THE_STOCK_COMMAND}
    with engine.serving(write_checkpoint(tmp_path, case.config, tensors), **arguments) as served:
        (found,) = served.speculated([prompt], DECODED)
    wanted = steps_of(case, prompt, DECODED, draft_tokens)
    share = [sum(step.accepted for step in wanted) / len(wanted), sum(found.accepted) / len(found.accepted)]
    assert share[1] == pytest.approx(share[0], abs=0.25 * draft_tokens)
