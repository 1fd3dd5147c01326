"""FP8 on a CPU: weights stay in FP8 in memory, and activations in bf16 (W8A16), in vLLM's kernels from SGLang.

vLLM chooses them on CPUs with AMX alone, and compiles them for all with AVX-512. Without it every FP8 weight is
dequantised when it is loaded.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod
from vllm.model_executor.layers.quantization.utils.fp8_utils import (
    create_fp8_scale_parameter,
    create_fp8_weight_parameter,
)
from vllm.model_executor.parameter import BlockQuantScaleParameter
from vllm.model_executor.utils import replace_parameter

from longcat_core.quantization import PUBLISHED_BLOCK
from longcat_core.weights.precision import Fp8Kernels
from longcat_vllm.devices.cpu.experts import CompactedRowsMethod

_BLOCK = [*PUBLISHED_BLOCK]


class CpuFp8Kernels(Fp8Kernels):
    def __init__(self, dtype: torch.dtype) -> None:
        self._are_there = dtype == torch.bfloat16 and hasattr(torch.ops._C, "fp8_scaled_mm_cpu")

    def take_linear(self, projections: Sequence[str], rows: Sequence[int], columns: int) -> bool:
        """Other numbers of rows end the process inside the kernel; of `kv_b_proj` attention needs the numbers."""
        return self._are_there and sum(rows) % 32 == 0 and projections[0] != "kv_b_proj"

    def take_experts(self, inner: int, hidden: int) -> bool:
        """Rows of gate and up projection have their own scales, so the latter's begin with a block."""
        return self._are_there and inner % PUBLISHED_BLOCK[0] == 0 and hidden % 32 == 0


@register_weight_loader_v2_supported_method
class CpuFp8LinearMethod(LinearMethodBase):
    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., Any] | None = None,
        **extra_weight_attrs: Any,
    ) -> None:
        """weight: FP8 [rows, columns]; weight_scale_inv: fp32, one for each block; both of this rank."""
        rows = sum(output_partition_sizes)
        layer.weight_block_size = _BLOCK  # which loaders of fused layers read
        layer.register_parameter("weight", create_fp8_weight_parameter(rows, input_size_per_partition, weight_loader))
        scale: Any = create_fp8_scale_parameter(
            BlockQuantScaleParameter,  # type: ignore[arg-type]  # vLLM's annotation is of an instance
            output_partition_sizes,
            input_size_per_partition,
            _BLOCK,
            weight_loader,
        )
        layer.register_parameter("weight_scale_inv", scale)

    def process_weights_after_loading(self, layer: Any) -> None:
        replace_parameter(layer, "weight", torch.ops._C.convert_weight_packed(layer.weight.data))
        replace_parameter(layer, "weight_scale_inv", layer.weight_scale_inv.data)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: bf16 [..., columns]. Returns bf16 [..., rows]."""
        flat = x.reshape(-1, x.shape[-1])
        product = torch.ops._C.fp8_scaled_mm_cpu(
            flat, layer.weight, layer.weight_scale_inv, _BLOCK, bias, x.dtype, True
        )
        return product.reshape(*x.shape[:-1], -1)


class CompactedFp8RowsMethod(CompactedRowsMethod):
    """`CompactedRowsMethod` for experts in FP8.

    vLLM's `Fp8MoEMethod` would look for a kernel of its own when it is made, and find none on a CPU without AMX.
    """

    def __init__(self, moe_config: FusedMoEConfig) -> None:
        super().__init__(moe_config)
        # What `create_weights` reads.
        self.block_quant, self.weight_block_size = True, _BLOCK
        self.moe_block_shape, self.weight_scale_refine = _BLOCK, None
        self.weight_scale_name = "weight_scale_inv"
        self.quant_config = _Dynamic()

    create_weights = Fp8MoEMethod.create_weights

    def select_kernel(self, layer: nn.Module) -> str:
        return "fp8"


class _Dynamic:
    activation_scheme = "dynamic"
