"""One LongCat layer of one rank in a decode step, without communication: plain torch around the MoE that is measured.

Of tensor-parallel ranks it has a part of the heads and of the dense FFNs, so its results are the rank's part of sums.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.inputs import random_weights
from longcat_core.config import LongcatConfig
from longcat_core.kernels.experts import ExpertWeights
from longcat_core.layers import rotary

MoE = Callable[[Tensor], Tensor]
"""Normed hidden states [T, H] to the MoE's result, [T, H]."""
AttentionCore = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(queries in latent space [T, heads, L], their rotary part [T, heads, rope], cache [B, N, L + rope], softmax scale) to
[T, heads, L]: T / B new tokens of each request, which are the last of its cache, each seeing those before it."""


@dataclass(frozen=True)
class AttentionWeights:
    """bf16; a rank has some of the heads. Both MLA scales are in the norms."""

    qkv_a: Tensor
    """[q_lora + L + rope, H]."""
    q_norm: Tensor
    q_b: Tensor
    """[heads x (nope + rope), q_lora]."""
    latent_norm: Tensor
    w_uk: Tensor
    """[heads, nope, L]."""
    w_uv: Tensor
    """[heads, v, L]."""
    o: Tensor
    """[H, heads x v]."""


@dataclass(frozen=True)
class DenseWeights:
    gate_up: Tensor
    """[2 F, H]."""
    down: Tensor
    """[H, F]."""


@dataclass(frozen=True)
class Step:
    """What a decode step works on."""

    cos: Tensor
    """fp32 [T, 1, rope / 2], with `sin`."""
    sin: Tensor
    caches: tuple[Tensor, Tensor]
    """bf16 [B, N, L + rope] of each attention; the last T / B tokens of each request are overwritten."""


class RankLayer:
    """Random weights of one rank of `ranks`, with `local_experts` FFN experts."""

    def __init__(
        self, config: LongcatConfig, ranks: int, local_experts: int, precision: str, device: torch.device
    ) -> None:
        self.config, self.device = config, device
        self._generator = torch.Generator(device).manual_seed(0)
        hidden = config.hidden_size
        heads, inner = config.num_attention_heads // ranks, config.ffn_hidden_size // ranks
        self.attentions = tuple(self._attention(heads) for _ in range(2))
        self.ffns = tuple(DenseWeights(self._weight(2 * inner, hidden), self._weight(hidden, inner)) for _ in range(2))
        self.norms = tuple(self._norm(hidden) for _ in range(4))
        """Before attention 0, the MoE and FFN 0, attention 1, FFN 1."""
        self.router = torch.randn(config.num_experts, hidden, generator=self._generator, device=device) * hidden**-0.5
        """fp32 [FFN and zero experts, H]."""
        self.experts: ExpertWeights = random_weights(config, local_experts, precision, device)

    def step(self, requests: int, new_tokens: int, context: int) -> Step:
        """Of so many requests with equal contexts, whose new tokens are the last of them."""
        positions = torch.arange(context - new_tokens, context, device=self.device).repeat(requests)
        frequencies = rotary.inverse_frequencies(self.config).to(self.device)
        cos, sin = rotary.cos_sin(positions.unsqueeze(-1), frequencies, rotary.attention_factor(self.config.rope))
        caches = (self._numbers(requests, context, self.config.latent_dim) for _ in range(2))
        return Step(cos, sin, (next(caches), next(caches)))

    def hidden_states(self, tokens: int) -> Tensor:
        return self._numbers(tokens, self.config.hidden_size)

    def __call__(
        self, x: Tensor, step: Step, moe: MoE, core: AttentionCore, side: torch.cuda.Stream | None = None
    ) -> Tensor:
        """The layer in the order of `reference.DecoderLayer`; side: a stream for the MoE, beside the dense branch."""
        before_attention, before_moe, before_second, before_last = self.norms
        x = x + self.attend(0, self._normed(x, before_attention), step, core)
        normed = self._normed(x, before_moe)
        if side is None:
            shortcut = moe(normed)
        else:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                shortcut = moe(normed)
        x = x + self.dense(0, normed)
        x = x + self.attend(1, self._normed(x, before_second), step, core)
        x = x + self.dense(1, self._normed(x, before_last))
        if side is not None:
            torch.cuda.current_stream().wait_stream(side)
        return x + shortcut

    def attend(self, which: int, x: Tensor, step: Step, core: AttentionCore) -> Tensor:
        """Projections, the cache's new tokens, the core, and the output projection: [T, H] to [T, H]."""
        config, weights, cache = self.config, self.attentions[which], step.caches[which]
        latent_size, rope = config.kv_lora_rank, config.qk_rope_head_dim
        query, latent, rope_key = F.linear(x, weights.qkv_a).split([config.q_lora_rank, latent_size, rope], dim=-1)
        query = F.linear(F.rms_norm(query, weights.q_norm.shape, weights.q_norm, config.mla_norm_eps), weights.q_b)
        query = query.unflatten(-1, (weights.w_uk.shape[0], -1))
        q_nope, q_rope = query.split([config.qk_nope_head_dim, rope], dim=-1)
        q_rope = rotary.rotate_interleaved(q_rope, step.cos, step.sin)
        latent = F.rms_norm(latent, weights.latent_norm.shape, weights.latent_norm, config.mla_norm_eps)
        rope_key = rotary.rotate_interleaved(rope_key.unsqueeze(-2), step.cos, step.sin).squeeze(-2)
        new = torch.cat((latent, rope_key), dim=-1).unflatten(0, (cache.shape[0], -1))
        cache[:, -new.shape[1] :] = new
        q_latent = torch.einsum("thp,hpl->thl", q_nope, weights.w_uk)
        attended = core(q_latent, q_rope, cache, config.softmax_scale)
        return F.linear(torch.einsum("thl,hvl->thv", attended, weights.w_uv).flatten(1), weights.o)

    def dense(self, which: int, x: Tensor) -> Tensor:
        weights = self.ffns[which]
        gate, up = F.linear(x, weights.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, weights.down)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def _attention(self, heads: int) -> AttentionWeights:
        config = self.config
        hidden, latent = config.hidden_size, config.kv_lora_rank
        return AttentionWeights(
            qkv_a=self._weight(config.q_lora_rank + config.latent_dim, hidden),
            q_norm=self._norm(config.q_lora_rank) * config.q_scale,
            q_b=self._weight(heads * config.qk_head_dim, config.q_lora_rank),
            latent_norm=self._norm(latent) * config.kv_scale,
            w_uk=self._weight(heads * config.qk_nope_head_dim, latent).unflatten(0, (heads, -1)),
            w_uv=self._weight(heads * config.v_head_dim, latent).unflatten(0, (heads, -1)),
            o=self._weight(hidden, heads * config.v_head_dim),
        )

    def _weight(self, rows: int, columns: int) -> Tensor:
        return self._numbers(rows, columns) * columns**-0.5

    def _norm(self, size: int) -> Tensor:
        return 1 + 0.1 * self._numbers(size)

    def _numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=torch.bfloat16)


def two_products(query_latent: Tensor, query_rope: Tensor, cache: Tensor, scale: float) -> Tensor:
    """An `AttentionCore` of torch alone: two batched products with a softmax between, which read the cache twice."""
    requests, context, _ = cache.shape
    heads, latent = query_latent.shape[1:]
    queries = torch.cat((query_latent, query_rope), dim=-1).unflatten(0, (requests, -1))
    new = queries.shape[1]
    scores = (queries.flatten(1, 2) @ cache.transpose(1, 2)).float().unflatten(1, (new, heads)) * scale
    ones = torch.ones(new, context, dtype=torch.bool, device=cache.device)
    scores = scores.masked_fill(ones.triu(context - new + 1).unsqueeze(1), float("-inf"))
    weights = scores.softmax(dim=-1).to(cache.dtype).flatten(1, 2)
    return (weights @ cache[..., :latent]).unflatten(1, (new, heads)).flatten(0, 1)
