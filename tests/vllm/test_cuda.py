"""On an NVIDIA GPU: vLLM's MLA backends and FusedMoE kernels, with torch.compile and CUDA graphs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.cases import DEFAULT, Case, in_dtype, write_checkpoint
from tests.oracle import oracle, oracle_logits, typical_error
from tests.vllm.engine import serving

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
    with serving(write_checkpoint(tmp_path, case.config, rounded), dtype="bfloat16", enforce_eager=False) as engine:
        ours = engine.log_softmax(prompt, case.config.vocab_size)
    assert typical_error(ours, exact) <= 2 * typical_error(theirs, exact)


def test_off_the_cpu_there_is_always_an_expert_map(
    checkpoint_of: Callable[[Case], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one, vLLM's kernels sum the slots of zero experts uninitialised."""
    case = Case(DEFAULT)
    with serving(checkpoint_of(case)) as engine:
        experts = engine.model.model.layers[0].mlp.experts.routed_experts
        monkeypatch.setattr("longcat_vllm.moe.current_platform", SimpleNamespace(is_cpu=lambda: False))
        experts.update_expert_map_info()
        assert experts.expert_map.tolist() == list(range(case.config.n_routed_experts))
