"""FFN experts on a CPU: vLLM's own kernels over rows of FFN experts only."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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

from longcat_core.kernels.cpu.experts import CompiledExperts
from longcat_core.kernels.cpu.library import multiplies_bf16
from longcat_core.kernels.cpu.product import is_quicker
from longcat_core.layers.experts import ExpertFFN, grouped_ffn, routed_experts
from longcat_core.quantization import PUBLISHED_BLOCK

logger = init_logger(f"vllm.{__name__}")


class CompactedRowsMethod(FusedMoEMethodBase):
    """Unquantised experts on a CPU, over rows of local FFN experts only.

    vLLM's CPU kernels hang on an id of -1 and ignore the expert map (experts/cpu_moe.py in 0.32), so they get
    one row for each choice of a local FFN expert, with a top-k of 1.
    """

    create_weights = UnquantizedFusedMoEMethod.create_weights

    @property
    def supports_eplb(self) -> bool:
        return True  # every parameter, a scale too, has the experts as its first axis, packed or not

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.cpu_kernel = self.select_kernel(layer)
        logger.info_once("LongCat experts on CPU: %s over rows of FFN experts only.", layer.cpu_kernel)
        pack = CPU_KERNELS[layer.cpu_kernel].pack
        replace_parameter(layer, "w13_weight", pack(layer.w13_weight.data))
        replace_parameter(layer, "w2_weight", pack(layer.w2_weight.data))
        layer.no_expert_map = torch.empty(0, dtype=torch.int32)

    def select_kernel(self, layer: Any) -> str:
        _, hidden, intermediate = layer.w2_weight.shape
        return select_cpu_kernel(hidden, intermediate, layer.w2_weight.dtype)

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
            getattr(layer, "w13_weight_scale_inv", None),
            getattr(layer, "w2_weight_scale_inv", None),
            layer.no_expert_map if layer.expert_map is None else layer.expert_map,
            layer.cpu_kernel,
        )


def select_cpu_kernel(hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> str:
    """The quickest kernel for experts of this shape on this CPU: vLLM's `bf16_dot` or `vector`, or, for any shape,
    core's `compiled` or `torch`."""
    if hidden_size % 32 or intermediate_size % 32:
        return "compiled" if is_quicker(dtype) else "torch"
    return "bf16_dot" if dtype == torch.bfloat16 and multiplies_bf16() else "vector"


def experts_of(runner: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """The experts of a layer's MoERunner, if one rank has all of them: hidden states [T, H], ids and weights [T, K] ->
    [T, H]."""
    layer, parallel = runner.routed_experts, runner.moe_config.moe_parallel_config
    method = layer.quant_method
    if not isinstance(method, CompactedRowsMethod) or not parallel.tp_size == parallel.dp_size == parallel.ep_size == 1:
        return None
    return lambda x, ids, weights: method.apply(layer, x, weights, ids, None, None)


def _dot(
    method: ops.CPUQuantMethod, w13: Tensor, w2: Tensor, s13: Tensor | None = None, s2: Tensor | None = None
) -> ExpertFFN:
    """vLLM's kernel from SGLang: AVX512-BF16 and AMX dot products."""
    block = None if s13 is None else [*PUBLISHED_BLOCK]

    def ffn(rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        outputs = torch.empty_like(rows)
        ops.fused_experts_cpu(outputs, rows, w13, w2, weights, experts, method, s13, s2, None, None, block)
        return outputs

    return ffn


def _vector(w13: Tensor, w2: Tensor, _s13: None = None, _s2: None = None) -> ExpertFFN:
    """vLLM's portable grouped GEMM."""

    def ffn(rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        outputs = torch.empty_like(rows)
        ops.cpu_fused_moe(outputs, rows, w13, w2, None, None, weights, experts, "silu", "vec")
        return outputs

    return ffn


def _torch(w13: Tensor, w2: Tensor, _s13: None = None, _s2: None = None) -> ExpertFFN:
    return grouped_ffn(w13, w2)


class CpuKernel(NamedTuple):
    pack: Callable[[Tensor], Tensor]
    """Stacked weights into the layout of the kernel, once after loading."""
    ffn: Callable[..., ExpertFFN]
    """From packed w13 and w2, and in FP8 the scales of both, fp32 [experts, blocks of rows, blocks of columns]."""


def _pack_for_dot(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops._C.convert_weight_packed(weight)
    return packed


CPU_KERNELS = {
    "bf16_dot": CpuKernel(_pack_for_dot, partial(_dot, ops.CPUQuantMethod.UNQUANT)),
    "fp8": CpuKernel(_pack_for_dot, partial(_dot, ops.CPUQuantMethod.FP8_W8A16)),
    "vector": CpuKernel(lambda weight: ops.cpu_prepack_moe_weight(weight, "vec"), _vector),
    "compiled": CpuKernel(lambda weight: weight, CompiledExperts),
    "torch": CpuKernel(lambda weight: weight, _torch),
}


def _cpu_experts(
    hidden_states: Tensor,
    ids: Tensor,
    weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scales: Tensor | None,
    w2_scales: Tensor | None,
    expert_map: Tensor,
    kernel: str,
) -> Tensor:
    """The number of rows depends on the routing, so torch.compile must not look inside."""
    local = expert_map if expert_map.numel() else None
    ffn = CPU_KERNELS[kernel].ffn(w13, w2, w13_scales, w2_scales)
    return routed_experts(hidden_states, ids, weights, ffn, local)


def _cpu_experts_fake(hidden_states: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hidden_states)


_LIBRARY = torch.library.Library("longcat", "FRAGMENT")
direct_register_custom_op("cpu_experts", _cpu_experts, fake_impl=_cpu_experts_fake, target_lib=_LIBRARY)
