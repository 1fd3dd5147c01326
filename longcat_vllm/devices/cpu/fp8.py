"""FP8 on a CPU: weights stay in FP8 in memory, and activations in bf16 (W8A16).

On a processor with products in bf16 vLLM's kernels from SGLang compute, where they take a weight; vLLM itself chooses
them on CPUs with AMX alone, and compiles them for all with AVX-512. Everywhere else core's compute. Without a compiler
core has none, and what vLLM's do not take is dequantised when it is loaded.
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

from longcat_core.kernels.cpu.fp8 import CompiledFp8Kernels
from longcat_core.kernels.cpu.library import multiplies_bf16
from longcat_core.kernels.cpu.product import takes_fp8
from longcat_core.quantization import PUBLISHED_BLOCK
from longcat_core.weights.blocks import dequantize_blocks
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


class CpuFp8Kernels(CompiledFp8Kernels):
    def __init__(self, dtype: torch.dtype) -> None:
        self._has_cores, self._has_vllms = takes_fp8(dtype), dtype == torch.bfloat16 and _has_vllms()

    def take_linear(self, projections: Sequence[str], rows: Sequence[int], columns: int) -> bool:
        return self._have_one(sum(rows), columns) and super().take_linear(projections, rows, columns)

    def take_experts(self, inner: int, hidden: int) -> bool:
        return self._have_one(hidden, inner) and super().take_experts(inner, hidden)

    def _have_one(self, rows: int, columns: int) -> bool:
        return self._has_cores or (self._has_vllms and _are_whole_tiles(rows, columns))


def _has_vllms() -> bool:
    return hasattr(torch.ops._C, "fp8_scaled_mm_cpu")


def _are_whole_tiles(rows: int, columns: int) -> bool:
    """Other sizes end the process inside vLLM's kernels."""
    return rows % 32 == 0 and columns % 32 == 0


def select_fp8_kernel(name: str, rows: int, weights: Iterable[tuple[Tensor, Tensor]]) -> str:
    """`vllm`, `compiled`, which is core's, or `none`, for a layer that is named so in the log.

    rows: of the layer's product; weights: FP8 [rows, columns] and scales of each of its experts, or its own.
    """
    weights = list(weights)
    prefers_cores = takes_fp8(torch.bfloat16) and not multiplies_bf16()
    if _has_vllms() and not prefers_cores and _are_whole_tiles(rows, weights[0][0].shape[1]):
        error = max(error_of_kernels(weight, scales) for weight, scales in weights)
        if error <= _ALLOWED:
            return "vllm"
        logger.info(
            "LongCat: %s is not left to vLLM's FP8 kernel, as its blocks have numbers that are too far apart for it, "
            "which would be wrong by %.1g of a row.",
            name,
            error,
        )
    return "compiled" if takes_fp8(torch.bfloat16) else "none"


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
        layer.fp8_kernel = select_fp8_kernel(layer.prefix, len(weight), [(weight, scales)])
        if layer.fp8_kernel == "vllm":
            weight = torch.ops._C.convert_weight_packed(weight)
        elif layer.fp8_kernel == "none":
            weight = dequantize_blocks(weight, scales, torch.bfloat16)
        replace_parameter(layer, "weight", weight)
        replace_parameter(layer, "weight_scale_inv", scales)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: bf16 [..., columns], of at least one row. Returns bf16 [..., rows]."""
        assert bias is None, "no layer of LongCat-Flash has a bias"
        if layer.fp8_kernel == "compiled":
            output: Tensor = torch.ops.longcat.cpu_product(x, layer.weight, layer.weight_scale_inv)
            return output
        if layer.fp8_kernel == "none":
            return torch.nn.functional.linear(x, layer.weight)
        flat = x.reshape(-1, x.shape[-1])
        product = torch.ops._C.fp8_scaled_mm_cpu(
            flat, layer.weight, layer.weight_scale_inv, _BLOCK, None, x.dtype, True
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
        """Dequantises the layer's experts first if there is no kernel for one of them."""
        weights = {
            name: (getattr(layer, f"{name}_weight").data, getattr(layer, f"{name}_weight_scale_inv").data)
            for name in ("w13", "w2")
        }
        pairs = {name: [*zip(*weights[name], strict=True)] for name in weights}
        kernels = {select_fp8_kernel(layer.layer_name, weights[name][0].shape[1], pairs[name]) for name in weights}
        if kernels == {"vllm"}:
            return "fp8"
        if "none" not in kernels:
            return "compiled"
        for name, each in pairs.items():
            dequantised = torch.stack([dequantize_blocks(*pair, torch.bfloat16) for pair in each])
            replace_parameter(layer, f"{name}_weight", dequantised)
        return super().select_kernel(layer)


class _Dynamic:
    activation_scheme = "dynamic"
