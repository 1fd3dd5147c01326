"""The tensors of a published checkpoint, by name and shape."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from longcat_core.config import LongcatConfig

MTP_PREFIX = "model.mtp."
SCALE_SUFFIX = "_scale_inv"

_STACKED = re.compile(r"(?P<experts>.*\.mlp\.experts)\.(?P<part>gate_up|down)_proj")


def expected_tensors(config: LongcatConfig, with_mtp: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a published checkpoint, without FP8 scales."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for n in range(config.num_layers):
        layer = f"model.layers.{n}"
        for i in range(2):
            shapes[f"{layer}.input_layernorm.{i}.weight"] = (hidden,)
            shapes[f"{layer}.post_attention_layernorm.{i}.weight"] = (hidden,)
            shapes |= _attention(f"{layer}.self_attn.{i}", config)
            shapes |= _ffn(f"{layer}.mlps.{i}", hidden, config.ffn_hidden_size)
        shapes[f"{layer}.mlp.router.classifier.weight"] = (config.num_experts, hidden)
        shapes[f"{layer}.mlp.router.e_score_correction_bias"] = (config.num_experts,)
        for e in range(config.n_routed_experts):
            shapes |= _ffn(f"{layer}.mlp.experts.{e}", hidden, config.expert_ffn_hidden_size)
    return shapes | (mtp_tensors(config) if with_mtp else {})


@cache
def all_tensors(config: LongcatConfig) -> Mapping[str, tuple[int, ...]]:
    """`expected_tensors` with the MTP layer, made once for a configuration."""
    return MappingProxyType(expected_tensors(config, with_mtp=True))


def _attention(prefix: str, config: LongcatConfig) -> dict[str, tuple[int, ...]]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    return {
        f"{prefix}.q_a_proj.weight": (config.q_lora_rank, hidden),
        f"{prefix}.q_a_layernorm.weight": (config.q_lora_rank,),
        f"{prefix}.q_b_proj.weight": (heads * config.qk_head_dim, config.q_lora_rank),
        f"{prefix}.kv_a_proj_with_mqa.weight": (config.latent_dim, hidden),
        f"{prefix}.kv_a_layernorm.weight": (config.kv_lora_rank,),
        f"{prefix}.kv_b_proj.weight": (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        f"{prefix}.o_proj.weight": (hidden, heads * config.v_head_dim),
    }


def _ffn(prefix: str, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (intermediate, hidden),
        f"{prefix}.up_proj.weight": (intermediate, hidden),
        f"{prefix}.down_proj.weight": (hidden, intermediate),
    }


def mtp_tensors(config: LongcatConfig) -> dict[str, tuple[int, ...]]:
    """As `expected_tensors`, of the MTP layer alone."""
    hidden, layer = config.hidden_size, f"{MTP_PREFIX}layers.0"
    return {
        f"{MTP_PREFIX}embed_tokens.weight": (config.vocab_size, hidden),
        f"{MTP_PREFIX}norm.weight": (hidden,),
        f"{layer}.eh_proj.weight": (hidden, 2 * hidden),
        f"{layer}.enorm.m.weight": (hidden,),
        f"{layer}.hnorm.m.weight": (hidden,),
        f"{layer}.input_layernorm.weight": (hidden,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
        **_attention(f"{layer}.self_attn", config),
        **_ffn(f"{layer}.transformer_layer.mlp", hidden, config.ffn_hidden_size),
    }


def stacked_experts(name: str) -> bool:
    """Whether a tensor has all experts of a layer, as transformers 5 holds them: `gate_up_proj` [E, 2 I, H], the gate
    above the up projection, or `down_proj` [E, H, I]."""
    return _STACKED.fullmatch(name) is not None


def expert_parts(name: str, config: LongcatConfig) -> list[str]:
    """The published names of what a tensor of stacked experts holds, expert by expert, the gate before the up
    projection. Rows of zero experts, which transformers keeps, have none."""
    match = _STACKED.fullmatch(name)
    assert match is not None, name
    parts = ("gate", "up") if match["part"] == "gate_up" else ("down",)
    return [f"{match['experts']}.{e}.{part}_proj.weight" for e in range(config.n_routed_experts) for part in parts]


def is_mtp(name: str) -> bool:
    """Whether a published tensor belongs to the MTP layer."""
    return name.startswith(MTP_PREFIX)
