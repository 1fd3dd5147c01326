"""On an NVIDIA GPU: the engines' MLA backends and MoE kernels, with the graphs that the stock command has on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.cases import DEFAULT, Case, in_dtype, write_checkpoint
from tests.harness import engine
from tests.oracle import oracle, oracle_logits, typical_error

# The attention sizes of every published LongCat-Flash, which are those that MLA kernels are built for.
PUBLISHED = replace(
    DEFAULT, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, num_attention_heads=16
)
CASES = {
    "published_attention": Case(PUBLISHED),
    "hidden_200": Case(replace(PUBLISHED, hidden_size=200)),
    "odd_experts": Case(replace(PUBLISHED, n_routed_experts=7, zero_expert_num=5, moe_topk=3)),
    "topk_beyond_ffn_experts": Case(replace(PUBLISHED, n_routed_experts=3, zero_expert_num=9, moe_topk=6)),
    "no_zero_experts": Case(replace(PUBLISHED, zero_expert_num=0)),
    "all_slots_zero_experts": Case(replace(PUBLISHED, zero_expert_num=6), zero_bias=0.25),
    "tied_head": Case(replace(PUBLISHED, tie_word_embeddings=True)),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", CASES)
def test_bf16_on_a_gpu_is_no_further_off_than_twice_transformers_own(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    rounded = in_dtype(case.published(), torch.bfloat16)
    prompt = case.prompts(1, 64)[0]
    exact, theirs = (
        oracle_logits(oracle(case.config, rounded, dtype), torch.tensor([prompt]))[0, :-1].log_softmax(dim=-1)
        for dtype in (torch.float32, torch.bfloat16)
    )
    directory = write_checkpoint(tmp_path, case.config, rounded)
    with engine.serving(directory, dtype="bfloat16", **engine.AS_THE_STOCK_COMMAND) as served:
        ours = served.log_softmax(prompt, case.config.vocab_size)
    assert typical_error(ours, exact) <= 2 * typical_error(theirs, exact)
