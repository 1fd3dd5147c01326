"""A LongCat-Flash model as one dataclass, and the numbers derived from it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from dataclasses import dataclass

from longcat_core.quantization import Quantization


class ConfigError(ValueError):
    """A configuration that is not a LongCat-Flash model this package can run; the message lists every problem."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the `qk_rope_head_dim` part of queries and keys, interleaved pairs.

    `factor` 1 alone is plain RoPE; anything else is YaRN (arXiv 2309.00071) as transformers'
    `_compute_yarn_parameters` has it. LongCat-Flash-Thinking-2601 uses YaRN, the other releases plain RoPE.
    """

    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    """0: the model's `max_position_embeddings`."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def is_yarn(self) -> bool:
        return self.factor != 1.0 or self.attention_factor is not None


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature (arXiv 2309.00071, equation 22, with DeepSeek's multiplier)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class LongcatConfig:
    """One LongCat-Flash model. Sizes are elements; names follow the published `config.json`.

    Source: technical report (arXiv 2509.01322) and the published repositories.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    ffn_hidden_size: int
    expert_ffn_hidden_size: int
    n_routed_experts: int
    moe_topk: int
    max_position_embeddings: int
    rope: RopeConfig
    zero_expert_num: int = 0
    routed_scaling_factor: float = 1.0
    rms_norm_eps: float = 1e-5
    # transformers builds the norms inside MLA with their default epsilon, not with `rms_norm_eps`.
    mla_norm_eps: float = 1e-6
    mla_scale_q_lora: bool = True
    mla_scale_kv_lora: bool = True
    tie_word_embeddings: bool = False
    quantization: Quantization | None = None

    # -- shapes and factors of the forward pass --------------------------------------------------

    @property
    def num_experts(self) -> int:
        """FFN and zero experts together: the router's width."""
        return self.n_routed_experts + self.zero_expert_num

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached for one token and one attention: the normed latent and the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def q_scale(self) -> float:
        """Factor on the whole query (nope and rope parts)."""
        return math.sqrt(self.hidden_size / self.q_lora_rank) if self.mla_scale_q_lora else 1.0

    @property
    def kv_scale(self) -> float:
        """Factor on the normed latent, so on the keys' nope part and on the values; the rope key has none."""
        return math.sqrt(self.hidden_size / self.kv_lora_rank) if self.mla_scale_kv_lora else 1.0

    @property
    def softmax_scale(self) -> float:
        scale = self.qk_head_dim**-0.5
        if self.rope.is_yarn and self.rope.mscale_all_dim:
            scale *= yarn_mscale(self.rope.factor, self.rope.mscale_all_dim) ** 2
        return scale

    # -- derived numbers -------------------------------------------------------------------------

    @property
    def attention_parameters(self) -> int:
        """Parameters of one MLA block."""
        heads, rank = self.num_attention_heads, self.q_lora_rank
        query = self.hidden_size * rank + rank + rank * heads * self.qk_head_dim
        latent = self.hidden_size * self.latent_dim + self.kv_lora_rank
        expand = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        return query + latent + expand + heads * self.v_head_dim * self.hidden_size

    @property
    def expert_parameters(self) -> int:
        """Parameters of one FFN expert (37.75 M for LongCat-Flash-Chat)."""
        return 3 * self.hidden_size * self.expert_ffn_hidden_size

    @property
    def _dense_layer_parameters(self) -> int:
        dense_ffn = 3 * self.hidden_size * self.ffn_hidden_size
        router = self.num_experts * (self.hidden_size + 1)
        return 2 * (self.attention_parameters + dense_ffn + 2 * self.hidden_size) + router

    @property
    def total_parameters(self) -> int:
        """All parameters of the main model, without the MTP layer."""
        layer = self._dense_layer_parameters + self.n_routed_experts * self.expert_parameters
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    def activated_parameters(self, ffn_experts: float) -> float:
        """Parameters that one token multiplies with, when `ffn_experts` of its choices in each layer are FFN experts.

        The embedding is a lookup and does not count; the output head does.
        """
        layer = self._dense_layer_parameters + ffn_experts * self.expert_parameters
        return self.num_layers * layer + self.vocab_size * self.hidden_size

    def kv_cache_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of cache for one token: two attentions a layer."""
        return self.num_layers * 2 * self.latent_dim * itemsize
