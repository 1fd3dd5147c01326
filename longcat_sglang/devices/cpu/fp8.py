"""FP8 on a CPU: weights stay in FP8 in memory, and activations in bf16 (W8A16), in core's kernels.

SGLang's own are in `sgl_kernel`, which its wheels do not have for a CPU. Without a compiler core has none either, and
every FP8 weight is dequantised when it is loaded.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod, Fp8MoEMethod
from torch import Tensor

from longcat_core.kernels.cpu.experts import CompiledExperts
from longcat_core.kernels.cpu.product import product
from longcat_core.layers.experts import routed_experts


class CpuFp8LinearMethod(Fp8LinearMethod):
    """Takes the place of SGLang's once that has made the weights, as SGLang's layers know loaders by its name."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """They are read as they are published."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: bf16 [..., columns]. Returns bf16 [..., rows]."""
        assert bias is None, "no layer of LongCat-Flash has a bias"
        return product(x, layer.weight, layer.weight_scale_inv)


class CompactedFp8RowsMethod(Fp8MoEMethod):
    """`CompactedRowsMethod` for experts in FP8, which are read as they are published."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """There is nothing to do, nor to undo before other weights are loaded."""

    def experts_of(self, layer: Any) -> CompiledExperts:
        """The experts of a layer."""
        scales = layer.w13_weight_scale_inv, layer.w2_weight_scale_inv
        return CompiledExperts(layer.w13_weight, layer.w2_weight, *scales)

    def apply(  # type: ignore[override]  # narrower than linear layers', as Fp8MoEMethod's
        self, layer: Any, dispatch_output: StandardDispatchOutput
    ) -> StandardCombineInput:
        assert isinstance(dispatch_output.topk_output, StandardTopKOutput)
        weights, ids, _ = dispatch_output.topk_output
        return StandardCombineInput(routed_experts(dispatch_output.hidden_states, ids, weights, self.experts_of(layer)))
