"""The models that every engine is compared on: one definition of configurations, weights and spellings."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longcat_core import spellings
from longcat_core.config import LongcatConfig, RopeConfig
from longcat_core.weights import checkpoint, names


@dataclass(frozen=True)
class Case:
    """One tiny LongCat-Flash with the traits its name says."""

    config: LongcatConfig
    zero_bias: float = 0.0
    """Added to the correction bias of every zero expert, so to its softmax score when experts are chosen."""

    def published(self, seed: int = 0, with_mtp: bool = True) -> dict[str, Tensor]:
        return published(self.config, seed, zero_bias=self.zero_bias, with_mtp=with_mtp)

    def prompts(self, count: int, length: int, seed: int = 0) -> list[list[int]]:
        """Random prompts of `length` tokens."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.config.vocab_size, (count, length), generator=generator).tolist()


# Splits over two ranks: even numbers of heads, experts and channels.
DEFAULT = LongcatConfig(
    vocab_size=320,
    hidden_size=64,
    num_layers=2,
    num_attention_heads=4,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    ffn_hidden_size=96,
    expert_ffn_hidden_size=32,
    n_routed_experts=8,
    moe_topk=4,
    max_position_embeddings=512,
    rope=RopeConfig(theta=1e7),
    zero_expert_num=4,
    routed_scaling_factor=6.0,
)
_YARN = RopeConfig(theta=1e4, factor=4.0, original_max_position_embeddings=128)

CASES: dict[str, Case] = {
    "default": Case(DEFAULT),
    "latent_512_rope_64": Case(
        replace(DEFAULT, num_layers=1, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=32, v_head_dim=32)
    ),
    "hidden_200": Case(replace(DEFAULT, num_layers=1, hidden_size=200, v_head_dim=24)),
    # An epsilon large enough that taking another norm's would show.
    "hidden_72": Case(replace(DEFAULT, num_layers=1, hidden_size=72, expert_ffn_hidden_size=40, rms_norm_eps=1e-3)),
    "odd_counts": Case(
        replace(DEFAULT, vocab_size=307, num_attention_heads=3, n_routed_experts=7, zero_expert_num=5, moe_topk=3)
    ),
    "topk_beyond_ffn_experts": Case(
        replace(DEFAULT, num_layers=1, n_routed_experts=3, zero_expert_num=9, moe_topk=6, routed_scaling_factor=2.5)
    ),
    "no_zero_experts": Case(replace(DEFAULT, num_layers=1, zero_expert_num=0)),
    "all_slots_zero_experts": Case(replace(DEFAULT, zero_expert_num=6), zero_bias=0.25),
    "tied_head": Case(replace(DEFAULT, tie_word_embeddings=True)),
    "yarn": Case(replace(DEFAULT, num_layers=1, rope=_YARN)),
    "yarn_mscale_all_dim": Case(replace(DEFAULT, num_layers=1, rope=replace(_YARN, mscale=1.0, mscale_all_dim=0.8))),
}


CHAT: dict[str, Any] = {
    "architectures": ["LongcatFlashForCausalLM"],
    "attention_bias": False,
    "vocab_size": 131072,
    "hidden_size": 6144,
    "num_layers": 28,
    "num_attention_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "ffn_hidden_size": 12288,
    "expert_ffn_hidden_size": 2048,
    "n_routed_experts": 512,
    "zero_expert_num": 256,
    "zero_expert_type": "identity",
    "moe_topk": 12,
    "routed_scaling_factor": 6.0,
    "router_bias": False,
    "rounter_params_dtype": "float32",
    "max_position_embeddings": 131072,
    "rope_theta": 10000000.0,
    "rms_norm_eps": 1e-05,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
"""`config.json` of LongCat-Flash-Chat, as far as it bears on the model."""


def published(
    config: LongcatConfig, seed: int = 0, *, zero_bias: float = 0.0, with_mtp: bool = True
) -> dict[str, Tensor]:
    """Random fp32 tensors under their published names, the same for a seed on every machine.

    Matrices keep the size of what they multiply, and the head spreads its logits, so that greedy decoding has
    clear winners and no part of the model is too faint to be missed. Norm weights are around 1, not at it.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in names.expected_tensors(config, with_mtp).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            noise *= 0.5 / config.num_experts  # half a mean score: changes some choices, not all
            noise[config.n_routed_experts :] += zero_bias
            tensors[name] = noise
        elif name.endswith("embed_tokens.weight"):
            tensors[name] = noise * (0.15 if config.tie_word_embeddings else 1.0)
        elif len(shape) == 1:
            tensors[name] = 1 + 0.2 * noise
        else:
            gain = 3.0 if name == "lm_head.weight" else 1.0
            tensors[name] = noise * gain * shape[1] ** -0.5
            if "_a_proj" in name:  # faint latents, so that the epsilon of the norms after them shows
                tensors[name][: config.q_lora_rank if "q_a_proj" in name else config.kv_lora_rank] *= 0.05
    return tensors


def drafting_tensors(config: LongcatConfig, seed: int = 0, disagreement: float = 1.0) -> dict[str, Tensor]:
    """`published`, with an MTP layer of whose drafts the target accepts about every second; the wider the model, the
    less `disagreement` that takes.

    All layers are damped, so that the target mostly continues from its last token, and the MTP layer reads nearly the
    same embedding. Every part of it still has a say, so that some drafts change when one is wrong: its own embedding,
    the hidden state, the norms, its attention with a latent of its own, its FFN.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = published(config, seed)
    for name, tensor in tensors.items():
        if name.endswith((".o_proj.weight", ".down_proj.weight")):
            tensor *= _DAMPING * disagreement
    for name in ("embed_tokens.weight", "norm.weight"):
        target = tensors[f"model.{name}"]
        spread = _SPREAD * disagreement * target.std()
        tensors[f"{names.MTP_PREFIX}{name}"] = target + spread * torch.randn(target.shape, generator=generator)
    hidden = config.hidden_size
    eh_proj = tensors[f"{names.MTP_PREFIX}layers.0.eh_proj.weight"]
    eh_proj[:, :hidden] = torch.eye(hidden)
    eh_proj[:, hidden:] *= _HIDDEN * disagreement
    return tensors


_DAMPING, _HIDDEN, _SPREAD = 0.2, 0.2, 0.1


def in_dtype(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A checkpoint in `dtype`, whose routers stay fp32 as LongCat publishes them."""
    return {name: tensor if ".mlp.router." in name else tensor.to(dtype) for name, tensor in tensors.items()}


def write_checkpoint(
    directory: Path,
    config: LongcatConfig,
    tensors: dict[str, Tensor],
    raw: dict[str, Any] | None = None,
) -> Path:
    """Write `config.json` (`raw`, or as published) and safetensors into `directory`, which is returned."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(spellings.published(config) if raw is None else raw, indent=2))
    checkpoint.save(tensors, directory)
    return directory


def every_spelling(config: LongcatConfig) -> dict[str, dict[str, Any]]:
    """The same model in every `config.json` spelling that has been met."""
    raw = spellings.published(config)
    rope = {"rope_theta": raw["rope_theta"], "rope_type": "default", **raw.get("rope_scaling", {})}
    zero_expert_type = {} if config.zero_expert_num else {"zero_expert_type": None}
    rope_type_as_type = (
        {"rope_scaling": {"type" if key == "rope_type" else key: value for key, value in raw["rope_scaling"].items()}}
        if "rope_scaling" in raw
        else {}
    )
    return {
        "published": raw,
        "with_model_type": {**raw, "model_type": "longcat_flash"},
        "auto_map": {**raw, "auto_map": {"AutoConfig": "configuration_longcat_flash.LongcatFlashConfig"}},
        "num_hidden_layers_only": _renamed(raw, num_layers="num_hidden_layers"),
        "num_hidden_layers_doubled": {**raw, "num_hidden_layers": 2 * config.num_layers},
        "num_hidden_layers_repeated": {**raw, "num_hidden_layers": config.num_layers},
        "mixtral_names": _renamed(
            raw,
            ffn_hidden_size="intermediate_size",
            expert_ffn_hidden_size="moe_intermediate_size",
            moe_topk="num_experts_per_tok",
            n_routed_experts="num_local_experts",
        ),
        "both_names": {
            **raw,
            "intermediate_size": config.ffn_hidden_size,
            "moe_intermediate_size": config.expert_ffn_hidden_size,
            "num_experts_per_tok": config.moe_topk,
        },
        "rope_parameters": {**_without(raw, "rope_theta", "rope_scaling"), "rope_parameters": rope},
        "rope_scaling_type": {**raw, **rope_type_as_type},
        "router_params_dtype": _renamed(raw, rounter_params_dtype="router_params_dtype"),
        "no_router_dtype": _without(raw, "rounter_params_dtype", "router_bias"),
        "no_zero_expert_type": {**_without(raw, "zero_expert_type"), **zero_expert_type},
        "transformers_names": {
            **_without(raw, "rope_theta", "rope_scaling", "zero_expert_type"),
            "model_type": "longcat_flash",
            "num_hidden_layers": 2 * config.num_layers,
            "head_dim": config.qk_rope_head_dim,
            "qk_head_dim": config.qk_head_dim,
            "num_key_value_heads": config.num_attention_heads,
            "rope_parameters": rope,
        },
    }


def _renamed(raw: dict[str, Any], **names: str) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in raw.items()}


def _without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}
