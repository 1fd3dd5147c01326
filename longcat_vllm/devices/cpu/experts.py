"""FFN experts on a CPU: vLLM's own kernels over rows of FFN experts only."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.utils import replace_parameter
from vllm.utils.torch_utils import direct_register_custom_op

from longcat_core.layers.experts import ExpertFFN, grouped_ffn, routed_experts

logger = init_logger(__name__)


class CompactedRowsMethod(FusedMoEMethodBase):
    """Unquantised experts on a CPU, over rows of local FFN experts only.

    vLLM's CPU kernels hang on an id of -1 and ignore the expert map (experts/cpu_moe.py in 0.32), so they get
    one row for each choice of a local FFN expert, with a top-k of 1.
    """

    create_weights = UnquantizedFusedMoEMethod.create_weights

    def process_weights_after_loading(self, layer: Any) -> None:
        _, hidden, intermediate = layer.w2_weight.shape
        layer.cpu_kernel = select_cpu_kernel(hidden, intermediate, layer.w2_weight.dtype)
        logger.info_once("LongCat experts on CPU: %s over rows of FFN experts only.", layer.cpu_kernel)
        pack = CPU_KERNELS[layer.cpu_kernel].pack
        replace_parameter(layer, "w13_weight", pack(layer.w13_weight.data))
        replace_parameter(layer, "w2_weight", pack(layer.w2_weight.data))
        layer.no_expert_map = torch.empty(0, dtype=torch.int32)

    def get_fused_moe_quant_config(self, layer: nn.Module) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def apply(  # type: ignore[override]  # narrower than linear layers', as every FusedMoEMethodBase's
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
