"""What a plan must know of a model, from data/models or a config.json: sizes of attention, FFNs, experts, tables."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longcat_core import spellings
from longcat_core.family import Member, member_of
from longcat_core.planning.hardware import DATA, read

MODELS = DATA / "models"


@dataclass(frozen=True)
class LatentAttention:
    """MLA. In decode the up projections of keys and values are multiplied into query and output (absorbed)."""

    heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def latent_dim(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim

    def replicated_parameters(self, hidden_size: int) -> int:
        """Of the projections into latent space, which every tensor-parallel rank has."""
        return hidden_size * (self.q_lora_rank + self.latent_dim)

    def query_parameters(self, hidden_size: int) -> int:
        """Of those before the scores, which ranks share by heads."""
        up = self.q_lora_rank * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        return self.heads * (up + self.kv_lora_rank * self.qk_nope_head_dim)

    def output_parameters(self, hidden_size: int) -> int:
        """Of those behind the scores, which ranks share by heads."""
        return self.heads * self.v_head_dim * (self.kv_lora_rank + hidden_size)

    def operations_a_pair(self) -> int:
        """Multiplications and additions for one query and one cached token, all heads: scores and values in latent
        space (FlashMLA's deep dive, 2025-04-22: 2 h_q s_q s_k (d_k + d_v))."""
        return 2 * self.heads * (self.latent_dim + self.kv_lora_rank)

    def cached_bytes(self, form: str) -> float:
        """Of one token, by the cache's form, one of `CACHE_FORMS`."""
        latent, rope = self.kv_lora_rank, self.qk_rope_head_dim
        return {
            "bf16": 2 * (latent + rope),
            "fp8": latent + 4 * latent / 128 + 2 * rope,
            "fp8-plain": latent + rope,
            "fp8-snapmla": latent + 2 * rope + 4,
        }[form]

    def is_cache_split(self) -> bool:
        """Whether tensor-parallel ranks share the cache: the latent has no heads."""
        return False


@dataclass(frozen=True)
class GroupedAttention:
    """Grouped-query attention; each tensor-parallel rank has its share of the key-value heads."""

    heads: int
    kv_heads: int
    head_dim: int

    def replicated_parameters(self, hidden_size: int) -> int:
        return 0

    def query_parameters(self, hidden_size: int) -> int:
        return hidden_size * (self.heads + 2 * self.kv_heads) * self.head_dim

    def output_parameters(self, hidden_size: int) -> int:
        return self.heads * self.head_dim * hidden_size

    def operations_a_pair(self) -> int:
        return 2 * self.heads * 2 * self.head_dim

    def cached_bytes(self, form: str) -> float:
        values = 2 * self.kv_heads * self.head_dim
        return {"bf16": 2 * values, "fp8-plain": values}[form]

    def is_cache_split(self) -> bool:
        return True


CACHE_FORMS = ("bf16", "fp8", "fp8-plain", "fp8-snapmla")
"""How a token is cached: 16 bits a value; FlashMLA's 656 bytes, of an FP8 latent with four fp32 scales and a rotary key
of 16 bits; 8 bits a value; an FP8 latent with one scale (as SnapMLA, arXiv 2602.10718, inferred)."""


@dataclass(frozen=True)
class Tables:
    """Of an n-gram embedding: `count` tables [rows + 2 t + 1, columns] and projections [hidden, columns]."""

    count: int
    rows: int
    columns: int

    @property
    def table_parameters(self) -> int:
        return self.columns * (self.count * self.rows + self.count * self.count)

    def parameters(self, hidden_size: int) -> int:
        return self.table_parameters + self.count * self.columns * hidden_size


@dataclass(frozen=True)
class Model:
    """A decoder with routed experts. In LongCat's a layer has two attentions and two dense FFNs beside its experts."""

    name: str
    vocab_size: int
    hidden_size: int
    layers: int
    attention: LatentAttention | GroupedAttention
    attentions_a_layer: int
    dense_ffns_a_layer: int
    """Beside experts."""
    ffn_hidden_size: int
    experts: int
    """FFN experts; zero experts have no weights."""
    zero_experts: int
    experts_a_token: int
    """FFN and zero experts together."""
    expert_hidden_size: int
    shared_experts: int = 0
    first_dense_layers: int = 0
    """Layers at the beginning that have a dense FFN in place of experts (DeepSeek's `first_k_dense_replace`)."""
    has_mtp: bool = False
    mtp_tables: bool = False
    """Whether the MTP layer has n-gram tables of its own."""
    ties_embeddings: bool = False
    tables: Tables | None = None
    repositories: Mapping[str, str] | None = None
    """Where weights are published, by precision."""
    is_shortcut: bool = False
    """Whether the experts' output is added only at the layer's end (ScMoE)."""
    remark: str = ""
    """What a reader of a plan has to know of the model."""

    @property
    def ffn_experts_a_token(self) -> float:
        """At the mean that training holds: the share of FFN experts among all (8 of 12 for LongCat-Flash)."""
        return self.experts_a_token * self.experts / (self.experts + self.zero_experts)

    @property
    def attention_parameters(self) -> int:
        """Of one attention, without norms."""
        hidden, attention = self.hidden_size, self.attention
        return (
            attention.replicated_parameters(hidden)
            + attention.query_parameters(hidden)
            + attention.output_parameters(hidden)
        )

    @property
    def expert_parameters(self) -> int:
        return 3 * self.hidden_size * self.expert_hidden_size

    @property
    def ffn_parameters(self) -> int:
        """Of one dense FFN."""
        return 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def router_parameters(self) -> int:
        return self.hidden_size * (self.experts + self.zero_experts)

    @property
    def mtp_parameters(self) -> int:
        """Of the MTP layer without its embedding: an attention, a dense FFN, the projection of two inputs to one."""
        return self.attention_parameters + self.ffn_parameters + 2 * self.hidden_size * self.hidden_size

    @property
    def total_parameters(self) -> int:
        """Matrices of the main model, without norms and without the MTP layer."""
        with_experts = (
            (self.experts + self.shared_experts) * self.expert_parameters
            + self.dense_ffns_a_layer * self.ffn_parameters
            + self.router_parameters
        )
        attention = self.layers * self.attentions_a_layer * self.attention_parameters
        ffns = (self.layers - self.first_dense_layers) * with_experts + self.first_dense_layers * self.ffn_parameters
        embeddings = (1 if self.ties_embeddings else 2) * self.vocab_size * self.hidden_size
        return attention + ffns + embeddings + (self.tables.parameters(self.hidden_size) if self.tables else 0)

    def activated_parameters(self, ffn_experts: float) -> float:
        """That a token multiplies with, the output head's included."""
        layer = (
            self.attentions_a_layer * self.attention_parameters
            + self.dense_ffns_a_layer * self.ffn_parameters
            + self.router_parameters
            + (ffn_experts + self.shared_experts) * self.expert_parameters
        )
        return self.layers * layer + self.vocab_size * self.hidden_size

    def cache_bytes_a_token(self, form: str = "bf16", with_mtp: bool = False) -> float:
        attentions = self.layers * self.attentions_a_layer + with_mtp
        return attentions * self.attention.cached_bytes(form)


def known() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in MODELS.glob("*.json")))


def model(text: str) -> Model:
    """By a name of `known()`, a checkpoint's directory, or the path of a config.json.

    Raises:
        ValueError: if it is none of these, or not of a model that is known; a ConfigError is one.
    """
    if text in known():
        return _published(read(MODELS / f"{text}.json"))
    path = Path(text)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"MODEL: {text!r}, wanted {', '.join(known())}, a checkpoint's directory or a config.json")
    return of_config(json.loads(file.read_text()), name=text)


def of_config(raw: Mapping[str, Any], name: str) -> Model:
    """From a config.json of LongCat-Flash or LongCat-Flash-Lite.

    Raises:
        ValueError: if it is of neither.
    """
    member = member_of(raw)
    if member not in (Member.FLASH, Member.NGRAM):
        raise ValueError(f"{name}: {member.value}; wanted LongCat-Flash or LongCat-Flash-Lite")
    config = spellings.read(raw)
    tables = None
    if member is Member.NGRAM:
        neighbours, splits, ratio = (
            raw.get(f"{ours}", raw.get(f"{theirs}"))
            for ours, theirs in (
                ("emb_neighbor_num", "oe_neighbor_num"),
                ("emb_split_num", "oe_split_num"),
                ("ngram_vocab_size_ratio", "oe_vocab_size_ratio"),
            )
        )
        if neighbours is None or splits is None or ratio is None:
            raise ValueError(f"{name}: emb_neighbor_num, emb_split_num or ngram_vocab_size_ratio missing")
        count = splits * (neighbours - 1)
        tables = Tables(count, int(ratio * config.vocab_size), config.hidden_size // count)
    return Model(
        name=name,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=config.num_layers,
        attention=LatentAttention(
            config.num_attention_heads,
            config.q_lora_rank,
            config.kv_lora_rank,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        ),
        attentions_a_layer=2,
        dense_ffns_a_layer=2,
        ffn_hidden_size=config.ffn_hidden_size,
        experts=config.n_routed_experts,
        zero_experts=config.zero_expert_num,
        experts_a_token=config.moe_topk,
        expert_hidden_size=config.expert_ffn_hidden_size,
        has_mtp=True,
        ties_embeddings=config.tie_word_embeddings,
        tables=tables,
        is_shortcut=True,
        remark=read(MODELS / "lite.json")["remark"] if tables is not None else "",
    )


def _published(raw: Mapping[str, Any]) -> Model:
    """From a file of data/models; its `source` is for readers."""
    fields = {name: value for name, value in raw.items() if name != "source"}
    of_attention = dict(fields.pop("attention"))
    kind = {"latent": LatentAttention, "grouped": GroupedAttention}[of_attention.pop("kind")]
    tables = fields.pop("tables", None)
    return Model(attention=kind(**of_attention), tables=Tables(**tables) if tables else None, **fields)
