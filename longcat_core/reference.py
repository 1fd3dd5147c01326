"""The whole of LongCat-Flash with its MTP layer in plain PyTorch: documentation, oracle and trainer in one."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longcat_core.config import LongcatConfig
from longcat_core.layers import rotary
from longcat_core.layers.experts import moe
from longcat_core.layers.routing import Routing, route
from longcat_core.weights import checkpoint, names, plan

LatentCache = list[Tensor]
"""One tensor [B, tokens so far, kv_lora_rank + qk_rope_head_dim] for each attention, in the order they run."""


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class LatentAttention(nn.Module):
    """Multi-head latent attention: queries through a low rank, keys and values out of one cached latent."""

    def __init__(self, config: LongcatConfig) -> None:
        super().__init__()
        self.config = config
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.mla_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.latent_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.mla_norm_eps)
        expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, expanded, bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """x: [B, T, H]; cos, sin: [B, T, rope / 2]; past: [B, P, L + rope]. Returns the output and the cache."""
        config = self.config
        nope, rope, rank = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)

        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) * config.q_scale
        q_nope, q_rope = query.unflatten(-1, (-1, config.qk_head_dim)).split([nope, rope], dim=-1)
        query = torch.cat((q_nope, rotary.rotate_interleaved(q_rope, cos, sin)), dim=-1)

        latent, k_rope = self.kv_a_proj_with_mqa(x).split([rank, rope], dim=-1)
        latent = self.kv_a_layernorm(latent) * config.kv_scale
        k_rope = rotary.rotate_interleaved(k_rope.unsqueeze(-2), cos, sin).squeeze(-2)
        cache = torch.cat((latent, k_rope), dim=-1)
        if past is not None:
            cache = torch.cat((past, cache), dim=1)

        latent, k_rope = cache.split([rank, rope], dim=-1)
        expanded = self.kv_b_proj(latent).unflatten(-1, (config.num_attention_heads, -1))
        k_nope, value = expanded.split([nope, config.v_head_dim], dim=-1)
        key = torch.cat((k_nope, k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], rope)), dim=-1)

        scores = torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float()) * config.softmax_scale
        new, total = query.shape[1], key.shape[1]
        future = torch.ones(new, total, dtype=torch.bool, device=x.device).triu(total - new + 1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1).to(value.dtype)
        attended = torch.einsum("bhqk,bkhd->bqhd", weights, value)
        return self.o_proj(attended.flatten(2)), cache


class DenseFFN(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    def __init__(self, config: LongcatConfig) -> None:
        super().__init__()
        self.config = config
        self.classifier = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> Routing:
        """x: [T, H]. The logits are fp32 whatever x is, under autocast too."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.classifier.weight.float())
        return route(
            logits,
            self.e_score_correction_bias,
            n_routed_experts=self.config.n_routed_experts,
            top_k=self.config.moe_topk,
            routed_scaling_factor=self.config.routed_scaling_factor,
        )


class Experts(nn.Module):
    """FFN experts, stacked as engines keep them; zero experts have no weights."""

    def __init__(self, config: LongcatConfig) -> None:
        super().__init__()
        experts, inner, hidden = config.n_routed_experts, config.expert_ffn_hidden_size, config.hidden_size
        self.w13 = nn.Parameter(torch.empty(experts, 2 * inner, hidden).normal_(std=0.02))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, inner).normal_(std=0.02))


class ZeroExpertMoE(nn.Module):
    def __init__(self, config: LongcatConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        return moe(tokens, self.router(tokens), self.experts.w13, self.experts.w2).view_as(x)


class DecoderLayer(nn.Module):
    """Two attentions, two dense FFNs, and one MoE that reads after the first attention and is added at the end.

    That detour is the shortcut-connected MoE: the MoE's communication can hide behind everything in between.
    """

    def __init__(self, config: LongcatConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.self_attn = nn.ModuleList(LatentAttention(config) for _ in range(2))
        self.mlps = nn.ModuleList(DenseFFN(hidden, config.ffn_hidden_size) for _ in range(2))
        self.input_layernorm = nn.ModuleList(RMSNorm(hidden, config.rms_norm_eps) for _ in range(2))
        self.post_attention_layernorm = nn.ModuleList(RMSNorm(hidden, config.rms_norm_eps) for _ in range(2))
        self.mlp = ZeroExpertMoE(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: LatentCache | None) -> tuple[Tensor, LatentCache]:
        past0, past1 = past if past is not None else (None, None)
        attended, cache0 = self.self_attn[0](self.input_layernorm[0](x), cos, sin, past0)
        x = x + attended
        normed = self.post_attention_layernorm[0](x)
        shortcut = self.mlp(normed)
        x = x + self.mlps[0](normed)

        attended, cache1 = self.self_attn[1](self.input_layernorm[1](x), cos, sin, past1)
        x = x + attended
        x = x + self.mlps[1](self.post_attention_layernorm[1](x)) + shortcut
        return x, [cache0, cache1]


class MTPBlock(nn.Module):
    """The draft layer: one dense layer on `eh_proj([enorm(embedding of the next token), hnorm(hidden)])`."""

    def __init__(self, config: LongcatConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.enorm = nn.ModuleDict({"m": RMSNorm(hidden, config.rms_norm_eps)})
        self.hnorm = nn.ModuleDict({"m": RMSNorm(hidden, config.rms_norm_eps)})
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.input_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.transformer_layer = nn.ModuleDict({"mlp": DenseFFN(hidden, config.ffn_hidden_size)})

    def forward(
        self, embedded: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, past: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x = self.eh_proj(torch.cat((self.enorm["m"](embedded), self.hnorm["m"](hidden)), dim=-1))
        attended, cache = self.self_attn(self.input_layernorm(x), cos, sin, past)
        x = x + attended
        return x + self.transformer_layer["mlp"](self.post_attention_layernorm(x)), cache


class MTP(nn.Module):
    def __init__(self, config: LongcatConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MTPBlock(config)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LongcatModel(nn.Module):
    def __init__(self, config: LongcatConfig, with_mtp: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mtp = MTP(config) if with_mtp else None


class LongcatForCausalLM(nn.Module):
    """LongCat-Flash. Parameters are named as published, except that the experts of a layer are stacked."""

    def __init__(self, config: LongcatConfig, with_mtp: bool = True) -> None:
        super().__init__()
        self.config = config
        self.model = LongcatModel(config, with_mtp)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, past: LatentCache | None = None) -> tuple[Tensor, Tensor, LatentCache]:
        """input_ids: int64 [B, T], following what `past` holds.

        Returns logits [B, T, vocabulary], the hidden states after the final norm [B, T, H] (what the MTP layer
        takes), and the cache for the next call.
        """
        x = self.model.embed_tokens(input_ids)
        cos, sin = self._angles(input_ids.shape[1], past)
        cache: LatentCache = []
        for index, layer in enumerate(self.model.layers):
            x, layer_cache = layer(x, cos, sin, past[2 * index : 2 * index + 2] if past is not None else None)
            cache += layer_cache
        hidden = self.model.norm(x)
        return self.lm_head(hidden), hidden, cache

    def draft(
        self, hidden: Tensor, next_tokens: Tensor, past: LatentCache | None = None
    ) -> tuple[Tensor, Tensor, LatentCache]:
        """One step of the MTP layer: from `hidden` [B, T, H] at some positions and the tokens [B, T] that follow
        them, logits for the tokens after those.

        Returns the logits, the layer's own normed output (the `hidden` of the next step of a chain), its cache.

        Raises:
            ValueError: if the model was built without its MTP layer.
        """
        mtp = self.model.mtp
        if mtp is None:
            raise ValueError(
                "draft: this model has no MTP layer; build it with_mtp=True from a checkpoint that has one"
            )
        cos, sin = self._angles(next_tokens.shape[1], past)
        x, cache = mtp.layers[0](mtp.embed_tokens(next_tokens), hidden, cos, sin, past[0] if past is not None else None)
        hidden = mtp.norm(x)
        return self.lm_head(hidden), hidden, [cache]

    @torch.no_grad()
    def generate(self, prompt: list[int], max_new_tokens: int) -> list[int]:
        """Greedy continuation of one prompt."""
        logits, _, cache = self(torch.tensor([prompt]))
        tokens: list[int] = []
        for _ in range(max_new_tokens):
            tokens.append(int(logits[0, -1].argmax()))
            logits, _, cache = self(torch.tensor([tokens[-1:]]), cache)
        return tokens

    @classmethod
    def from_checkpoint(cls, directory: Path, dtype: torch.dtype = torch.float32) -> LongcatForCausalLM:
        """Build from a directory with `config.json` and safetensors; the router stays fp32.

        Raises:
            ConfigError, CheckpointError: if either is not what it should be.
        """
        config = checkpoint.read_config(directory)
        tensors = checkpoint.load(directory, config)
        model = cls(config, with_mtp=any(name.startswith(names.MTP_PREFIX) for name in tensors)).to(dtype)
        for module in model.modules():
            if isinstance(module, Router):
                module.float()
        model.load_published(tensors)
        return model.eval()

    def load_published(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy published tensors into the parameters; names and shapes are those of `names.expected_tensors`."""
        state = self.state_dict()
        for name, tensor in tensors.items():
            place = plan.place(name, self.config)
            state[place.parameter][place.part].copy_(tensor)

    def published(self) -> dict[str, Tensor]:
        """The parameters under their published names, as views."""
        with_mtp = self.model.mtp is not None
        state = self.state_dict()
        places = {n: plan.place(n, self.config) for n in names.expected_tensors(self.config, with_mtp)}
        return {name: state[place.parameter][place.part] for name, place in places.items()}

    def _angles(self, new: int, past: LatentCache | None) -> tuple[Tensor, Tensor]:
        first, device = past[0].shape[1] if past is not None else 0, self.lm_head.weight.device
        positions = torch.arange(first, first + new, device=device).unsqueeze(0)
        frequencies = rotary.inverse_frequencies(self.config).to(device)
        return rotary.cos_sin(positions, frequencies, rotary.attention_factor(self.config.rope))
