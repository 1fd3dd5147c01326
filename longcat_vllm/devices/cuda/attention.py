"""FlashInfer's MLA on Hopper as a backend of vLLM: a token, its drafts and all heads share tiles of 128 rows.

vLLM 0.32 has FlashInfer's MLA for Blackwell and for sparse models; on Hopper it chooses FlashAttention. Prefill stays
vLLM's own.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.config.cache import CacheDType
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonDecodeMetadata,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.platforms.interface import DeviceCapability
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionCGSupport, AttentionLayer, CommonAttentionMetadata, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from longcat_core.weights.blocks import FP8
from longcat_vllm.devices.cuda.decode_plan import DecodePlans, DecodeSizes, DecodeStep


class FlashInferPagedMLABackend(MLACommonBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @staticmethod
    def get_name() -> str:
        return "LONGCAT_FLASHINFER_MLA"

    @staticmethod
    def get_impl_cls() -> type[FlashInferPagedMLAImpl]:
        return FlashInferPagedMLAImpl

    @staticmethod
    def get_builder_cls() -> type[FlashInferPagedMLABuilder]:
        return FlashInferPagedMLABuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [576]

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability.major == 9

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # queries are planned on the CPU


@dataclass
class DecodeMetadata(MLACommonDecodeMetadata):
    wrapper: Any
    """FlashInfer's, planned for this step."""


class FlashInferPagedMLABuilder(MLACommonMetadataBuilder[MLACommonMetadata[DecodeMetadata]]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        drafts = vllm_config.num_speculative_tokens
        dtype: Any = vllm_config.model_config.dtype
        self._plans = DecodePlans(
            DecodeSizes(
                num_heads=self.num_heads,
                kv_lora_rank=self.mla_dims.kv_lora_rank,
                rope_dim=self.mla_dims.qk_rope_head_dim,
                page_size=self.page_size,
                max_requests=max(vllm_config.scheduler_config.max_num_seqs, captured),
                max_pages=-(-(vllm_config.model_config.max_model_len + drafts) // self.page_size),
                softmax_scale=layer.impl.scale,
                query_dtype=dtype,
                cache_dtype=FP8 if is_quantized_kv_cache(layer.kv_cache_dtype) else dtype,
                num_drafts=drafts,
            ),
            device,
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> MLACommonMetadata[DecodeMetadata]:
        self._length_bounds = common_attn_metadata.seq_lens_cpu_upper_bound
        return super().build(common_prefix_len, common_attn_metadata, fast_build)

    def _build_decode(
        self,
        block_table_tensor: Tensor,
        seq_lens_device: Tensor,
        max_seq_len: int,
        query_start_loc_cpu: Tensor,
        query_start_loc_device: Tensor,
        num_decode_tokens: int,
        max_query_len: int,
        dcp_tot_seq_lens_device: Tensor | None,
    ) -> DecodeMetadata:
        requests = seq_lens_device.shape[0]
        bounds = self._length_bounds[:requests] if self._length_bounds is not None else seq_lens_device.cpu()
        step = DecodeStep(query_start_loc_cpu, num_decode_tokens, bounds, seq_lens_device, block_table_tensor)
        return DecodeMetadata(block_table_tensor, seq_lens_device, dcp_tot_seq_lens_device, self._plans.plan(step))


class FlashInferPagedMLAImpl(MLACommonImpl[MLACommonMetadata[DecodeMetadata]]):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.supports_quant_query_input = False  # FlashInfer reads an FP8 cache with queries in bf16

    def forward_mqa(
        self,
        q: Tensor | tuple[Tensor, Tensor],
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: MLACommonMetadata[DecodeMetadata],
        layer: AttentionLayer,
    ) -> tuple[Tensor, None]:
        """q: [T, heads, latent + rope], or split; cache: [pages, page size, latent + rope]. -> [T, heads, latent]"""
        assert attn_metadata.decode is not None
        parts = [self.kv_lora_rank, self.qk_rope_head_dim]
        q_nope, q_rope = q if isinstance(q, tuple) else q.split(parts, dim=-1)
        cache, scales = kv_c_and_k_pe_cache, {}
        if is_quantized_kv_cache(self.kv_cache_dtype):
            scale = float(layer._k_scale_float)
            cache, scales = cache.view(FP8), {"ckv_scale": scale, "kpe_scale": scale}
        latents, rope_keys = cache.split(parts, dim=-1)
        output = attn_metadata.decode.wrapper.run(query=(q_nope, q_rope), kv_cache=(latents, rope_keys), **scales)
        return output, None
