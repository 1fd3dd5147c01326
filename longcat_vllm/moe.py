"""LongCat's router and experts against vLLM's FusedMoE: zero experts are dropped before any kernel sees them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.platforms import current_platform

from longcat_core.config import LongcatConfig
from longcat_core.experts import add_identity
from longcat_core.routing import route

logger = init_logger(f"vllm.{__name__}")


class LongcatMoE(nn.Module):
    """Router, FFN experts and zero experts of one layer."""

    def __init__(self, config: LongcatConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.config = config
        self.router = LongcatRouter(config, prefix=f"{prefix}.router")
        self.experts = FusedMoEFactory(
            num_experts=config.n_routed_experts,
            top_k=config.moe_topk,
            hidden_size=config.hidden_size,
            intermediate_size=config.expert_ffn_hidden_size,
            renormalize=False,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
            router=PrecomputedRouting(config.moe_topk, config.n_routed_experts),
            router_logits_dtype=torch.float32,
            routed_experts_cls=ZeroExpertAwareExperts,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> [T, H], reduced over ranks; the identity term is added after the reduction, so once."""
        routing = route(
            self.router(hidden_states),
            self.router.e_score_correction_bias,
            n_routed_experts=self.config.n_routed_experts,
            top_k=self.config.moe_topk,
            routed_scaling_factor=self.config.routed_scaling_factor,
        )
        routed = self.experts(hidden_states, PrecomputedRouting.pack(routing.weights, routing.ids))
        return add_identity(routed, hidden_states, routing.identity)


class LongcatRouter(nn.Module):
    def __init__(self, config: LongcatConfig, prefix: str) -> None:
        super().__init__()
        self.classifier = GateLinear(
            config.hidden_size,
            config.num_experts,
            out_dtype=torch.float32,
            params_dtype=torch.float32,
            prefix=f"{prefix}.classifier",
        )
        bias = torch.zeros(config.num_experts, dtype=torch.float32)
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """fp32 logits [T, FFN experts + zero experts]."""
        logits, _ = self.classifier(hidden_states)
        return logits


class PrecomputedRouting(BaseRouter):
    """Hands vLLM's runner a routing that the model has computed already.

    The model needs the routing itself, for the identity term; a router inside the runner sits in an opaque
    operator and could only return it as a side effect, which torch.compile does not see (vLLM's own
    ZeroExpertRouter does so). What the runner takes for router logits is `pack`: [T, 2 K].
    """

    def __init__(self, top_k: int, num_experts: int) -> None:
        super().__init__(top_k=top_k, global_num_experts=num_experts)

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.Unspecified  # keeps kernels with built-in routing away

    @staticmethod
    def pack(weights: Tensor, ids: Tensor) -> Tensor:
        return torch.cat((weights, ids.float()), dim=-1)

    def _compute_routing(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        weights, ids = router_logits.split(self.top_k, dim=-1)
        return weights.contiguous(), ids.to(indices_type or torch.int32).contiguous()


class ZeroExpertAwareExperts(RoutedExperts):
    """vLLM's container of expert weights, with kernels that skip ids of -1."""

    def update_expert_map_info(self) -> None:
        """Keep an expert map on CUDA even where experts are not spread over ranks: the identity.

        With a map, vLLM's Triton experts drop slots whose id is -1 (`moe_align_block_size`, `moe_sum`); without one,
        they sum those slots' outputs uninitialised. The price is vLLM's shortcut for batches of very few tokens
        (`naive_block_assignment`), which it takes only without a map.
        """
        super().update_expert_map_info()
        if self.expert_map_manager.expert_map is None and not current_platform.is_cpu():
            self._expert_map = torch.arange(self.global_num_experts, dtype=torch.int32, device=self.moe_config.device)

    def _get_quant_method(
        self, prefix: str, quant_config: QuantizationConfig | None, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        assert quant_config is None, "deployment.check refuses it"
        if current_platform.is_cpu():
            from longcat_vllm.cpu_experts import CompactedRowsMethod

            return CompactedRowsMethod(moe_config)
        moe_config.is_lora_enabled = False  # adapters.py: no adapter changes experts, so any kernel will do
        return skipping_zero_experts(partial(super()._get_quant_method, prefix, quant_config, moe_config), moe_config)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """
        Raises:
            RuntimeError: where the weights are in a layout that loading them would make of them once more.
        """
        method = self.quant_method
        if hasattr(self, "cpu_kernel") or (kernel_of(method) == "FlashInferExperts" and method.moe_kernel is not None):
            raise RuntimeError(
                f"{prefix}: the weights of the experts are packed for this device's kernel, and would be packed once "
                "more when they are loaded; save the state with --moe-backend triton on a GPU, or serve the checkpoint"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)


SKIP_ZERO_EXPERTS = ("TritonExperts", "FlashInferExperts")
"""vLLM's experts that were read to skip ids of -1: by the expert map, and by the range of a rank's experts."""


def kernel_of(method: FusedMoEMethodBase) -> str:
    """vLLM's experts class by name; without one, the method's own class, as where a kernel routes by itself."""
    experts = getattr(method, "experts_cls", None)
    return (experts or type(method)).__name__


def skipping_zero_experts(choose: Callable[[], FusedMoEMethodBase], moe_config: FusedMoEConfig) -> FusedMoEMethodBase:
    """vLLM's choice of a kernel if that is known to skip zero experts, else Triton's.

    `deployment.check` has refused whatever the user could have asked for instead.

    Raises:
        ValueError: if there is no such kernel for this deployment.
    """
    method = choose()
    chosen = kernel_of(method)
    if chosen in SKIP_ZERO_EXPERTS:
        return method
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
    return method
