"""LongCat-Flash's attention in SGLang."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA
from sglang.srt.utils import BumpAllocator, bind_or_assign
from torch import Tensor

from longcat_core.weights.blocks import FP8, dequantize_blocks
from longcat_sglang import devices
from longcat_sglang.config import LongcatFlashConfig
from longcat_sglang.devices.cuda.rotary import LongcatRotaryEmbedding

if TYPE_CHECKING:
    from longcat_sglang.devices.base import Angles


class LongcatAttention(DeepseekV2AttentionMLA):
    """MLA. Both MLA scales are folded into the norms' weights when these are loaded.

    SGLang's layer for DeepSeek's MLA, whose forward pass knows its CUDA backends; a device may have another one.
    """

    def __init__(
        self,
        hf_config: LongcatFlashConfig,
        layer_id: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        alt_stream: torch.cuda.Stream | None,
        rotary_embedding: LongcatRotaryEmbedding | None,
    ) -> None:
        config = hf_config.longcat
        super().__init__(
            config=hf_config,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            quant_config=quant_config,
            reduce_results=False,  # the layer boundary does, with the norm
            layer_id=layer_id,
            prefix=prefix,
            alt_stream=alt_stream,
            skip_rope=True,
        )
        self.rotary_emb = rotary_embedding
        self.w_kc: Tensor  # type: ignore[assignment]  # None until the weights are loaded
        self.w_vc: Tensor  # type: ignore[assignment]
        self.compiled: Any = None  # a device's own, once it has asked
        for norm in (self.q_a_layernorm, self.kv_a_layernorm):
            norm.variance_epsilon = config.mla_norm_eps
        self.scaling = config.softmax_scale
        for module in self.modules():
            if isinstance(module, RadixAttention):
                module.scaling = config.softmax_scale

    def forward(  # type: ignore[override]  # LongcatLayer alone calls it, with the angles
        self,
        positions: Tensor,
        hidden_states: Tensor,
        forward_batch: ForwardBatch,
        zero_allocator: BumpAllocator,
        angles: Angles | None,
    ) -> Tensor:
        """hidden_states: [T, H]; angles: the device's. Returns [T, H], a part of the sum over ranks."""
        return self.project(positions, hidden_states, forward_batch, zero_allocator, angles)()

    def project(
        self,
        positions: Tensor,
        hidden_states: Tensor,
        forward_batch: ForwardBatch,
        zero_allocator: BumpAllocator,
        angles: Angles | None,
    ) -> Callable[[], Tensor]:
        """The part of `forward` before tokens attend to each other. Returns the rest of it, with its result."""
        return devices.current().project(self, positions, hidden_states, forward_batch, zero_allocator, angles)

    def process_weights_after_loading(self) -> None:
        """Take `kv_b_proj` apart into w_kc [heads, nope, latent] and w_vc [heads, latent, v], in SGLang's strides.

        They are never in FP8: SGLang's products with them there have one scale for a whole tensor.
        """
        weight: Any = self.kv_b_proj.weight
        if weight.dtype == FP8:  # as published still, as SGLang lays it out for its kernels only afterwards
            scales: Any = self.kv_b_proj.weight_scale_inv
            weight = dequantize_blocks(weight, scales, self.kv_a_layernorm.weight.dtype)
        parts = weight.unflatten(0, (self.num_local_heads, -1))
        w_kc, w_vc = parts.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        self.w_kc = bind_or_assign(self.w_kc, w_kc.transpose(1, 2).contiguous().transpose(1, 2))
        self.w_vc = bind_or_assign(self.w_vc, w_vc.contiguous().transpose(1, 2))
