"""FFN experts on a GPU by core's kernels, on request: experts of vLLM's modular kernel, with its own weights."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm.model_executor.layers.fused_moe import modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    QuantKey,
    create_fp8_quant_key,
    kFp8Dynamic128Sym,
    kFp8Static128BlockSym,
)
from vllm.platforms import current_platform

from longcat_core.kernels.experts import ExpertWeights
from longcat_core.kernels.moe import routed_experts


class LongcatExperts(mk.FusedMoEExpertsModular):
    """Rows of local FFN experts only: an id of -1, and that of another rank's expert, has none.

    Called inside vLLM's operator for the whole MoE, into which torch.compile does not look. Nothing is read back from
    the device, and all that depends on the routing is on it, as a CUDA graph needs.
    """

    def __init__(self, moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig) -> None:
        super().__init__(moe_config, quant_config)
        self._device = current_platform.get_device_name()

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True  # they are rounded to FP8 here, as the second product's are

    @staticmethod
    def _supports_current_device() -> bool:
        return current_platform.is_cuda()

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
        return (weight_key, activation_key) in ((None, None), (kFp8Static128BlockSym, kFp8Dynamic128Sym))

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation == MoEActivation.SILU

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        return not moe_parallel_config.use_all2all_kernels or moe_parallel_config.use_ag_rs_all2all_kernels

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self,
        M: int,  # noqa: N803  # vLLM's names
        N: int,  # noqa: N803
        K: int,  # noqa: N803
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Between the products, which vLLM may lay where the result is; of each choice; the result."""
        return (M, topk, N // 2), (M, topk, K), (M, K)

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        routed_experts(
            hidden_states,
            topk_ids,
            topk_weights,
            ExpertWeights(w1, w2, self.w1_scale, self.w2_scale),
            self._device,
            expert_map,
            inner=workspace13,
            outputs=workspace2,
            result=output,
        )


def with_our_kernels(choose: Callable[[], FusedMoEMethodBase], moe_config: FusedMoEConfig) -> FusedMoEMethodBase:
    """vLLM's method with Triton's experts, which leaves weights as they are loaded, and ours in their place.

    `deployment.check` has refused what a user can request that they do not support.

    Raises:
        ValueError: if they do not support this deployment.
    """
    moe_config.moe_backend = "triton"
    method: Any = choose()
    block = getattr(method, "moe_block_shape", None)
    weight_key = None if block is None else create_fp8_quant_key(static=True, group_shape=GroupShape(*block))
    is_supported, reason = LongcatExperts.is_supported_config(
        LongcatExperts,
        moe_config,
        weight_key,
        None if block is None else kFp8Dynamic128Sym,
        LongcatExperts.activation_format(),
    )
    if not is_supported:
        raise ValueError(f"longcat-serving's kernels cannot compute these experts: {reason}; leave the kernels out")
    method.experts_cls = LongcatExperts
    typed: FusedMoEMethodBase = method
    return typed
