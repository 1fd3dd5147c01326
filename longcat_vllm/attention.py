"""LongCat-Flash's attention in vLLM."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig

from longcat_core.config import LongcatConfig
from longcat_vllm import devices


class LongcatAttention(nn.Module):
    """MLA. Both MLA scales are folded into the norms' weights when these are loaded."""

    def __init__(
        self, config: LongcatConfig, vllm_config: VllmConfig, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads // get_tensor_model_parallel_world_size()
        self.fused_qkv_a_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.q_lora_rank, config.latent_dim],
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.fused_qkv_a_proj",
            disable_tp=True,
        )
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=config.mla_norm_eps)
        self.q_b_proj = ColumnParallelLinear(
            config.q_lora_rank,
            config.num_attention_heads * config.qk_head_dim,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.q_b_proj",
        )
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps=config.mla_norm_eps)
        self.kv_b_proj = ColumnParallelLinear(
            config.kv_lora_rank,
            config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim),
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.kv_b_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.v_head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.attn = MLAAttention(
            num_heads=self.num_heads,
            scale=config.softmax_scale,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            kv_b_proj=self.kv_b_proj,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
            attn_backend=devices.current().attention_backend(),
        )
        self.attn.register_state_dict_post_hook(_leave_derived_weights_out)
        self.rotate = devices.current().rotate

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """hidden_states: [T, H]; cos and sin: fp32 [T, 1, rope / 2]."""
        return self.attend(*self.project(hidden_states, cos, sin))

    def project(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, heads, nope + rope], latents [T, kv_lora_rank], rotated keys [T, 1, rope]."""
        config = self.config
        qkv_a, _ = self.fused_qkv_a_proj(hidden_states)
        q_a, latent, k_rope = qkv_a.split([config.q_lora_rank, config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        query, _ = self.q_b_proj(self.q_a_layernorm(q_a))
        query, k_rope = self.rotate(query.unflatten(-1, (self.num_heads, -1)), k_rope.unsqueeze(-2), cos, sin)
        return query, self.kv_a_layernorm(latent), k_rope

    def attend(self, query: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
        """[T, H]."""
        output_shape = (query.shape[0], self.num_heads * self.config.v_head_dim)
        output, _ = self.o_proj(self.attn(query, latent, k_rope, output_shape=output_shape))
        return output


def _leave_derived_weights_out(attention: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """Tensors that attention derives from `kv_b_proj` after loading are not saved: no model has them when it loads."""
    for name in ("W_UK_T", "W_UV"):
        state.pop(f"{prefix}{name}", None)
