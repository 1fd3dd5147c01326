"""Linear layers and the head on a CPU: of few rows, of any where torch has no products in bf16, and in FP8."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from torch import Tensor

from longcat_core.kernels.cpu.experts import CompiledFFN
from longcat_core.kernels.cpu.product import Projection, is_quicker_than_torch, product
from longcat_core.plugin.kept import kept
from longcat_sglang.devices.cpu.fp8 import CpuFp8LinearMethod

if TYPE_CHECKING:
    from longcat_sglang.ffn import LongcatFFN


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


def projection(layer: Any) -> Projection | None:
    """A linear layer's weight, if core's kernels take it as it is."""
    method = type(getattr(layer, "quant_method", None))
    if method is CpuFp8LinearMethod:
        return Projection(layer.weight, layer.weight_scale_inv)
    if method is CompiledLinearMethod and is_quicker_than_torch(layer.weight.dtype, rows=1):
        return Projection(layer.weight)
    return None


def compiled_ffn(ffn: LongcatFFN) -> CompiledFFN | None:
    """A dense FFN of few tokens in one call, if core's kernels take both weights."""
    return kept(ffn, _compiled)


def _compiled(ffn: LongcatFFN) -> CompiledFFN | None:
    gate_up, down = projection(ffn.gate_up_proj), projection(ffn.down_proj)
    return None if gate_up is None or down is None else CompiledFFN.of(gate_up, down)


METHODS: dict[type, type] = {
    UnquantizedLinearMethod: CompiledLinearMethod,
    UnquantizedEmbeddingMethod: CompiledHeadMethod,
    Fp8LinearMethod: CpuFp8LinearMethod,
}
