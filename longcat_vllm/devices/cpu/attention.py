"""The MLA backend for CPUs: vLLM's paged cache and metadata around `longcat_core.layers.latent_attention`.

On CUDA vLLM's own MLA backends (FlashMLA, FlashAttention, Triton) are used and nothing here is loaded. vLLM's CPU_MLA
takes latent 512 + rope 64 and block size 16 only, and neither chunked prefill nor prefix caching.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend
from vllm.v1.attention.backend import (
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MLAAttentionImpl,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

from longcat_core.kernels.cpu.attention import paged_attention, takes, write_latents
from longcat_core.kernels.cpu.mla import Mla
from longcat_core.layers.latent_attention import PagedBatch, UpProjection
from longcat_vllm.devices.cpu.linear import projection

if TYPE_CHECKING:
    from longcat_vllm.attention import LongcatAttention


@dataclass
class LatentAttentionMetadata(AttentionMetadata):
    """One step. `MLAAttention.forward_impl` hands what it counts as prefill tokens to `forward_mha`; here that is
    all tokens, as `paged_attention` treats prefill, decode and verification alike."""

    batch: PagedBatch
    num_actual_tokens: int
    num_prefills: int
    num_decodes: int = 0
    num_decode_tokens: int = 0
    prefill: None = None
    decode: None = None


class LatentAttentionMetadataBuilder(AttentionMetadataBuilder[LatentAttentionMetadata]):
    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LatentAttentionMetadata:
        step, requests = common_attn_metadata, common_attn_metadata.num_reqs
        batch = PagedBatch(
            query_starts=step.query_start_loc_cpu[: requests + 1].tolist(),
            seq_lens=step.seq_lens[:requests].tolist(),
            block_table=step.block_table_tensor,
            block_size=self.kv_cache_spec.block_size,
        )
        return LatentAttentionMetadata(batch, num_actual_tokens=step.num_actual_tokens, num_prefills=requests)


class LatentAttentionImpl(MLAAttentionImpl[LatentAttentionMetadata]):
    """Any latent size and head count, any block size."""

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, **mla: Any) -> None:
        if self.dcp_world_size > 1 or self.pcp_world_size > 1:
            raise ValueError("LongCat on a CPU: context parallelism is not supported; use tensor parallelism")
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self._nope, self._kv_b_proj = mla["qk_nope_head_dim"], mla["kv_b_proj"]

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.up = UpProjection.of(self._kv_b_proj.weight.to(act_dtype), self.num_heads, self._nope)

    def do_kv_cache_update(
        self,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str,
        k_scale: Tensor,
    ) -> None:
        if kv_cache.numel():
            slots = slot_mapping.flatten()
            new = slots.numel()
            write_latents(kv_cache.view(-1, self.head_size), kv_c_normed[:new], k_pe.squeeze(1)[:new], slots)

    def forward_mha(
        self,
        q: Tensor,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: LatentAttentionMetadata,
        k_scale: Tensor,
        output: Tensor,
        output_scale: Tensor | None = None,
    ) -> None:
        cache = kv_c_and_k_pe_cache.view(-1, self.head_size)
        attended = paged_attention(q, cache, attn_metadata.batch, self.up, self.scale)
        output.copy_(attended.flatten(1))

    def forward_mqa(
        self,
        q: Tensor | tuple[Tensor, Tensor],
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: LatentAttentionMetadata,
        layer: AttentionLayer,
    ) -> tuple[Tensor, Tensor | None]:
        raise AssertionError("LatentAttentionMetadata counts every token as prefill")


class LatentAttentionBackend(MLACommonBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "CPU_MLA"

    @staticmethod
    def get_impl_cls() -> type[LatentAttentionImpl]:
        return LatentAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[LatentAttentionMetadataBuilder]:  # type: ignore[override]  # vLLM takes any builder
        return LatentAttentionMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []  # any

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]


def cache_of(attention: Any) -> Tensor:
    """Of an MLAAttention: [slots, latent + rope]."""
    cache: Tensor = attention.kv_cache
    return cache.view(-1, cache.shape[-1])


def compiled_mla(attention: LongcatAttention) -> Mla | None:
    """An attention of few tokens in one call, if core's kernels take all of its weights, and its rank has all heads."""
    implementation: Any = attention.attn.impl
    qkv_a, q_b, o = map(projection, (attention.fused_qkv_a_proj, attention.q_b_proj, attention.o_proj))
    if qkv_a is None or q_b is None or o is None or get_tensor_model_parallel_world_size() > 1:
        return None
    if not isinstance(implementation, LatentAttentionImpl) or not takes(implementation.up):
        return None
    norms = attention.q_a_layernorm.weight, attention.kv_a_layernorm.weight
    epsilon = attention.config.mla_norm_eps
    return Mla(qkv_a, *norms, q_b, implementation.up, o, epsilon, implementation.scale)
