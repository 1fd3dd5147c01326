"""LongCat's router and experts against vLLM's FusedMoE: zero experts are dropped before any kernel sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from longcat_core.config import LongcatConfig
from longcat_core.experts import ExpertFFN, add_identity, grouped_ffn, routed_experts
from longcat_core.routing import route

logger = init_logger(__name__)


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
    """vLLM's container of expert weights, so set up that its kernels skip ids of -1.

    With an expert map, vLLM's alignment and reduction skip every slot whose id is -1 (`moe_align_block_size`,
    `moe_sum`); without one, the slots' outputs are summed uninitialised. So there is always a map: the identity
    where experts are not spread over ranks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.expert_map is None and not current_platform.is_cpu():
            self._expert_map = torch.arange(self.global_num_experts, dtype=torch.int32, device=self.moe_config.device)

    def _get_quant_method(
        self, prefix: str, quant_config: QuantizationConfig | None, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        if not current_platform.is_cpu():
            return super()._get_quant_method(prefix, quant_config, moe_config)
        assert quant_config is None, "compat.check_deployment refuses it"
        return CompactedRowsMethod(moe_config)


class CompactedRowsMethod(FusedMoEMethodBase):
    """Unquantised experts on a CPU, over rows of local FFN experts only.

    vLLM's CPU kernels hang on an id of -1 and ignore the expert map (experts/cpu_moe.py in 0.32), so they are given
    one row for each slot that is really to be computed, with a top-k of 1.
    """

    create_weights = UnquantizedFusedMoEMethod.create_weights

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        _, hidden, intermediate = layer.w2_weight.shape
        layer.cpu_kernel = select_cpu_kernel(hidden, intermediate, layer.w2_weight.dtype)
        logger.info_once("LongCat experts on CPU: %s over rows of FFN experts only.", layer.cpu_kernel)
        pack = CPU_KERNELS[layer.cpu_kernel].pack
        replace_parameter(layer, "w13_weight", pack(layer.w13_weight.data))
        replace_parameter(layer, "w2_weight", pack(layer.w2_weight.data))
        layer.no_expert_map = torch.empty(0, dtype=torch.int32)

    def get_fused_moe_quant_config(self, layer: nn.Module) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        return torch.ops.longcat.cpu_experts(
            x,
            topk_ids,
            topk_weights,
            layer.w13_weight,
            layer.w2_weight,
            layer.no_expert_map if layer.expert_map is None else layer.expert_map,
            layer.cpu_kernel,
        )


def select_cpu_kernel(hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> str:
    """The quickest kernel for experts of this shape on this CPU: `bf16_dot`, `vector` or, for any shape, `torch`."""
    if hidden_size % 32 or intermediate_size % 32:
        return "torch"
    has_bf16_dot = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16_dot" if dtype == torch.bfloat16 and has_bf16_dot else "vector"


def _bf16_dot(w13: Tensor, w2: Tensor) -> ExpertFFN:
    """vLLM's kernel from SGLang: AVX512-BF16 and AMX dot products."""

    def ffn(rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        outputs = torch.empty_like(rows)
        ops.fused_experts_cpu(
            outputs,
            rows,
            w13,
            w2,
            weights,
            experts,
            ops.CPUQuantMethod.UNQUANT,
            *(None,) * 5,
        )
        return outputs

    return ffn


def _vector(w13: Tensor, w2: Tensor) -> ExpertFFN:
    """vLLM's portable grouped GEMM."""

    def ffn(rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        outputs = torch.empty_like(rows)
        ops.cpu_fused_moe(outputs, rows, w13, w2, None, None, weights, experts, "silu", "vec")
        return outputs

    return ffn


class CpuKernel(NamedTuple):
    pack: Callable[[Tensor], Tensor]
    """Stacked weights into the layout of the kernel, once after loading."""
    ffn: Callable[[Tensor, Tensor], ExpertFFN]
    """From packed w13 and w2."""


CPU_KERNELS = {
    "bf16_dot": CpuKernel(lambda weight: torch.ops._C.convert_weight_packed(weight), _bf16_dot),
    "vector": CpuKernel(lambda weight: ops.cpu_prepack_moe_weight(weight, "vec"), _vector),
    "torch": CpuKernel(lambda weight: weight, grouped_ffn),
}


def _cpu_experts(
    hidden_states: Tensor, ids: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, expert_map: Tensor, kernel: str
) -> Tensor:
    """The number of rows depends on the routing, so torch.compile must not look inside."""
    local = expert_map if expert_map.numel() else None
    return routed_experts(hidden_states, ids, weights, CPU_KERNELS[kernel].ffn(w13, w2), local)


def _cpu_experts_fake(
    hidden_states: Tensor, ids: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, expert_map: Tensor, kernel: str
) -> Tensor:
    return torch.empty_like(hidden_states)


_LIBRARY = torch.library.Library("longcat", "FRAGMENT")
direct_register_custom_op("cpu_experts", _cpu_experts, fake_impl=_cpu_experts_fake, target_lib=_LIBRARY)
