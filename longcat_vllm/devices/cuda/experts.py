"""FFN experts on a GPU: those of vLLM's kernels that drop a zero expert, an id of -1, and the choice among them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

logger = init_logger(f"vllm.{__name__}")

SKIP_ZERO_EXPERTS = ("TritonExperts", "FlashInferExperts", "TritonOrDeepGemmExperts")
"""vLLM's experts that skip ids of -1: by the expert map, by the range of a rank's experts, and by the map again, which
DeepGEMM's counting and scattering of rows read as Triton's do (read in vLLM 0.32)."""

NAIVE_SPARSITY = 4
"""vLLM's shortcut is for as many choices as experts are four times at least (`_prepare_expert_assignment`)."""


def kernel_of(method: FusedMoEMethodBase) -> str:
    """The name of vLLM's experts class; if there is none, as where a kernel does its own routing, of the method's."""
    experts = getattr(method, "experts_cls", None)
    return (experts or type(method)).__name__


class TritonExpertsOfFewTokens(TritonExperts):
    """Triton's experts, without the identity map where vLLM has a shortcut for few tokens that takes -1 as it is.

    Such a batch (`naive_block_assignment`) has a block for each choice, and that of -1 writes zeros: no rows are
    arranged, which are two launches less a layer. vLLM takes it only without an expert map; with more tokens, a choice
    of -1 is dropped only with one. The number of tokens is that of a graph when it is captured.
    """

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
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        num_experts = w1.shape[0]
        has_all_experts = expert_map is not None and expert_map.numel() == num_experts
        if has_all_experts and topk_ids.numel() * NAIVE_SPARSITY <= num_experts:
            expert_map = None
        return super().apply(
            output,
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            activation,
            global_num_experts,
            expert_map,
            *args,
            **kwargs,
        )


def skipping_zero_experts(choose: Callable[[], FusedMoEMethodBase], moe_config: FusedMoEConfig) -> FusedMoEMethodBase:
    """vLLM's choice of a kernel if that is known to skip zero experts, else Triton's.

    `deployment.check` has refused every other kernel that a user can request.

    Raises:
        ValueError: if there is no such kernel for this deployment.
    """
    method = choose()
    chosen = kernel_of(method)
    if chosen in SKIP_ZERO_EXPERTS:
        return _for_few_tokens(method)
    moe_config.moe_backend = "triton"
    method = choose()
    if kernel_of(method) not in SKIP_ZERO_EXPERTS:
        raise ValueError(
            f"MoE kernel {kernel_of(method)} is not known to skip zero experts, wanted one of "
            f"{', '.join(SKIP_ZERO_EXPERTS)}; leave --all2all-backend out"
        )
    logger.info_once(
        "LongCat experts: %s instead of vLLM's choice, %s, which is not known to skip zero experts.",
        kernel_of(method),
        chosen,
    )
    return _for_few_tokens(method)


def _for_few_tokens(method: Any) -> FusedMoEMethodBase:
    if method.experts_cls is TritonExperts:
        method.experts_cls = TritonExpertsOfFewTokens
    typed: FusedMoEMethodBase = method
    return typed
