"""Linear layers and the head on a CPU: of few rows, of any where torch has no products in bf16, and in FP8."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from torch import Tensor

from longcat_core.kernels.cpu.product import is_quicker_than_torch, product
from longcat_sglang.devices.cpu.fp8 import CpuFp8LinearMethod


class _Compiled:
    """Core's product in place of torch's, where it is quicker."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if is_quicker_than_torch(layer.weight.dtype, x.shape[:-1].numel()):
            assert bias is None, "no layer of LongCat-Flash has a bias"
            return product(x, layer.weight)
        output: Tensor = super().apply(layer, x, bias)  # type: ignore[misc]  # SGLang's class comes next
        return output


class CompiledLinearMethod(_Compiled, UnquantizedLinearMethod):
    pass


class CompiledHeadMethod(_Compiled, UnquantizedEmbeddingMethod):
    """The head may be the embedding as well."""


METHODS: dict[type, type] = {
    UnquantizedLinearMethod: CompiledLinearMethod,
    UnquantizedEmbeddingMethod: CompiledHeadMethod,
    Fp8LinearMethod: CpuFp8LinearMethod,
}
