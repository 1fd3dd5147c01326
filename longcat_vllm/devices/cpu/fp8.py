"""FP8 on a CPU: weights stay in FP8 in memory, and activations in bf16 (W8A16), in vLLM's kernels from SGLang.

vLLM chooses them on CPUs with AMX alone, and compiles them for all with AVX-512. Without it every FP8 weight is
dequantised when it is loaded.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
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
from longcat_core.weights.blocks import FP8, dequantize_blocks
from longcat_core.weights.precision import Fp8Kernels
from longcat_vllm.devices.cpu.experts import CompactedRowsMethod

logger = init_logger(f"vllm.{__name__}")
_BLOCK = [*PUBLISHED_BLOCK]
_SMALLEST_NORMAL = 2.0**-6
_ALLOWED = 2.0**-8
"""Of a row's norm: what rounding it to bf16 costs at most."""


def error_of_kernels(weight: Tensor, scales: Tensor) -> float:
    """The greatest error of a row of FP8 [rows, columns] in vLLM's kernels, over the row's norm; a bound.

    They give a number whose exponent is 0 the exponent of 2^-7 (`CVT_FP8_TO_BF16_EXT` in csrc/cpu/sgl-kernels/vec.h of
    0.32), so that 0 is read as 2^-7 times its scale. That is nothing where the numbers of a block are alike, and 5 % of
    rows that share a block with a number 10,000 times theirs.
    """
    codes = dequantize_blocks(weight, torch.ones_like(scales))
    columns = -(-codes.shape[1] // _BLOCK[1]) * _BLOCK[1] - codes.shape[1]
    by_block = torch.nn.functional.pad(codes, (0, columns), value=1.0).unflatten(1, (-1, _BLOCK[1]))
    squares = scales.repeat_interleave(_BLOCK[0], dim=0)[: len(codes)].square()  # [rows, blocks]
    wrong = (by_block.abs() < _SMALLEST_NORMAL).sum(dim=2) * (_SMALLEST_NORMAL / 2) ** 2 * squares
    exact = torch.nn.functional.pad(codes, (0, columns)).unflatten(1, (-1, _BLOCK[1])).square_().sum(dim=2) * squares
    return float((wrong.sum(dim=1) / exact.sum(dim=1)).nan_to_num(0.0).max().sqrt())


class CpuFp8Kernels(Fp8Kernels):
    def __init__(self, dtype: torch.dtype) -> None:
        self._are_there = dtype == torch.bfloat16 and hasattr(torch.ops._C, "fp8_scaled_mm_cpu")

    def take_linear(self, projections: Sequence[str], rows: Sequence[int], columns: int) -> bool:
        """Other numbers of rows end the process inside the kernel; of `kv_b_proj` attention needs the numbers."""
        is_of_whole_tiles = sum(rows) % 32 == 0 and columns % 32 == 0
        return self._are_there and is_of_whole_tiles and projections[0] != "kv_b_proj"

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
        weight, scales = layer.weight.data, layer.weight_scale_inv.data
        if _are_read_wrongly(layer.prefix, [(weight, scales)]):
            replace_parameter(layer, "weight", dequantize_blocks(weight, scales, torch.bfloat16))
        else:
            replace_parameter(layer, "weight", torch.ops._C.convert_weight_packed(weight))
        replace_parameter(layer, "weight_scale_inv", scales)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: bf16 [..., columns], of at least one row. Returns bf16 [..., rows]."""
        if layer.weight.dtype != FP8:
            return torch.nn.functional.linear(x, layer.weight, bias)
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

    def select_kernel(self, layer: Any) -> str:
        """Dequantises the layer's experts first if the kernel cannot read one of them."""
        for name in ("w13", "w2"):
            weight, scales = getattr(layer, f"{name}_weight").data, getattr(layer, f"{name}_weight_scale_inv").data
            if _are_read_wrongly(layer.layer_name, zip(weight, scales, strict=True)):
                break
        else:
            return "fp8"
        for name in ("w13", "w2"):
            weight, scales = getattr(layer, f"{name}_weight").data, getattr(layer, f"{name}_weight_scale_inv").data
            pairs = zip(weight, scales, strict=True)
            replace_parameter(
                layer, f"{name}_weight", torch.stack([dequantize_blocks(*p, torch.bfloat16) for p in pairs])
            )
        return super().select_kernel(layer)


def _are_read_wrongly(name: str, weights: Iterable[tuple[Tensor, Tensor]]) -> bool:
    error = max(error_of_kernels(weight, scales) for weight, scales in weights)
    if error > _ALLOWED:
        logger.info(
            "LongCat: %s is dequantised, as its blocks have numbers that are too far apart for this CPU's FP8 kernel, "
            "which would be wrong by %.1g of a row.",
            name,
            error,
        )
    return error > _ALLOWED


class _Dynamic:
    activation_scheme = "dynamic"
