"""vLLM's kernels for the same operations, called as its layers call them: what ours are measured against.

Nothing of vLLM is imported before it is asked for: a GPU host may have none.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import MissingError
from benchmarks.gpu.inputs import Batch
from longcat_core.config import LongcatConfig
from longcat_core.kernels.experts import ExpertWeights
from longcat_core.layers.experts import add_identity

_CACHE_BLOCK = 64
"""Tokens of a block of the cache."""


def require() -> None:
    """
    Raises:
        MissingError: if vLLM's MoE kernels cannot be used here.
    """
    if not torch.cuda.is_available():
        raise MissingError("vLLM's kernels are measured on a GPU alone")
    if find_spec("vllm") is None:
        raise MissingError("vLLM is not installed here: put it on PYTHONPATH to measure its kernels")
    try:
        import vllm._custom_ops  # noqa: F401

        torch.ops._moe_C.moe_align_block_size  # noqa: B018
    except (ImportError, AttributeError, OSError) as error:
        raise MissingError(f"vLLM's compiled MoE kernels do not load here: {error}") from error


class TritonMoE:
    """vLLM's Triton experts with the expert map that makes them skip ids of -1, and the identity after them.

    The identity is compiled by torch.compile where `is_compiled`, as it is in a server.
    """

    def __init__(self, config: LongcatConfig, weights: ExpertWeights, is_compiled: bool) -> None:
        require()
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation
        from vllm.model_executor.layers.fused_moe.config import (
            FusedMoEConfig,
            FusedMoEParallelConfig,
            FusedMoEQuantConfig,
            RoutingMethodType,
            fp8_w8a8_moe_quant_config,
        )
        from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

        local, hidden, inner = weights.w2.shape
        self._weights, self._silu = weights, MoEActivation.SILU
        self._moe = FusedMoEConfig(
            num_experts=config.n_routed_experts,
            experts_per_token=config.moe_topk,
            hidden_dim=hidden,
            intermediate_size=inner,
            num_local_experts=local,
            num_logical_experts=config.n_routed_experts,
            activation=MoEActivation.SILU,
            device=weights.w2.device,
            routing_method=RoutingMethodType.Unspecified,
            moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
            in_dtype=torch.bfloat16,
        )
        if weights.is_fp8:
            scales: dict[str, Any] = {"w1_scale": weights.w13_scales, "w2_scale": weights.w2_scales}
            self._quant = fp8_w8a8_moe_quant_config(**scales, block_shape=[128, 128])
        else:
            self._quant = FusedMoEQuantConfig.make()
        self._experts = TritonExperts(self._moe, self._quant)
        self._identity_map = torch.arange(local, dtype=torch.int32, device=weights.w2.device)
        self._add_identity = torch.compile(add_identity, dynamic=True) if is_compiled else add_identity

    def __call__(self, batch: Batch) -> Tensor:
        """[R, H] in bf16."""
        routed = self.routed(batch)
        return self._add_identity(routed, batch.hidden_states, batch.routing.identity)

    def routed(self, batch: Batch) -> Tensor:
        """The FFN experts' part alone, [R, H]."""
        rows, top_k = batch.routing.ids.shape
        _, hidden, inner = self._weights.w2.shape
        expert_map = self._identity_map if batch.expert_map is None else batch.expert_map
        of_all, local = expert_map.shape[0], self._weights.w2.shape[0]
        shapes = self._experts.workspace_shapes(rows, 2 * inner, hidden, top_k, of_all, local, None, self._silu)
        x, scales = batch.hidden_states, None
        if self._weights.is_fp8:
            x, scales = quantize(batch.hidden_states)
        first, second, result = (batch.hidden_states.new_empty(shape) for shape in shapes)
        self._experts.apply(
            result,
            x,
            self._weights.w13,
            self._weights.w2,
            batch.routing.weights,
            batch.routing.ids,
            self._silu,
            of_all,
            expert_map,
            scales,
            None,
            first,
            second,
            None,
            False,
        )
        return result


class InTreeRouter:
    """vLLM's own routing for LongCat: top-k, the zero experts' output, and their ids replaced by 0."""

    def __init__(self, config: LongcatConfig, bias: Tensor) -> None:
        require()
        from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter

        self._router = ZeroExpertRouter(
            top_k=config.moe_topk,
            global_num_experts=config.n_routed_experts,
            e_score_correction_bias=bias,
            num_logical_experts=config.n_routed_experts,
            zero_expert_type="identity",
            routed_scaling_factor=config.routed_scaling_factor,
        )

    def __call__(self, hidden_states: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights fp32 [T, K], ids int32 [T, K] where a zero expert is 0, and what zero experts contribute, [T, H]."""
        weights, ids = self._router._compute_routing(hidden_states, logits, torch.int32)
        zero = self._router.zero_expert_output
        assert zero is not None, "the router computes it with every routing"
        return weights, ids, zero


def arrange(ids: Tensor, experts: int, block_rows: int, expert_map: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Slots by expert, the expert of each block, and the number of rows."""
    require()
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    return moe_align_block_size(ids, block_rows, experts, expert_map, ignore_invalid_experts=True)


def combine(outputs: Tensor, ids: Tensor, expert_map: Tensor) -> Tensor:
    """The sum of weighted outputs [T, K, H] without those of -1."""
    require()
    from vllm import _custom_ops as ops

    routed = torch.empty_like(outputs[:, 0])
    ops.moe_sum(outputs, routed, ids, expert_map)
    return routed


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in FP8 with a scale for each 128."""
    require()
    from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8

    return per_token_group_quant_fp8(rows, 128)


class FlashAttention3:
    """MLA of new tokens over whole contexts, by vLLM's choice on Hopper: an `AttentionCore` of `layer`."""

    def __init__(self, batch: int, new_tokens: int, context: int, device: torch.device) -> None:
        require()
        if context % _CACHE_BLOCK:
            raise ValueError(f"a context of {context} tokens: wanted a multiple of {_CACHE_BLOCK}")
        numbers = torch.arange(batch * context // _CACHE_BLOCK, dtype=torch.int32, device=device)
        self._blocks = numbers.view(batch, -1)
        self._starts = torch.arange(0, batch * new_tokens + 1, new_tokens, dtype=torch.int32, device=device)
        self._contexts = torch.full((batch,), context, dtype=torch.int32, device=device)
        self._new_tokens, self._context = new_tokens, context

    def __call__(self, query_latent: Tensor, query_rope: Tensor, cache: Tensor, scale: float) -> Tensor:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        blocks = cache.view(-1, _CACHE_BLOCK, 1, cache.shape[-1])
        latents, rope_keys = blocks.split([query_latent.shape[-1], query_rope.shape[-1]], dim=-1)
        return flash_attn_varlen_func(
            q=query_rope,
            k=rope_keys,
            v=latents,
            q_v=query_latent,
            max_seqlen_q=self._new_tokens,
            cu_seqlens_q=self._starts,
            max_seqlen_k=self._context,
            seqused_k=self._contexts,
            block_table=self._blocks,
            softmax_scale=scale,
            causal=True,
            fa_version=3,
        )
