"""Linear layers and the head on a CPU without products in bf16, where torch multiplies row by row."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from torch import Tensor, nn

from longcat_core.kernels.cpu.product import is_quicker, product


class CompiledLinearMethod(UnquantizedLinearMethod):
    """SGLang's method, with core's product in place of torch's."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not is_quicker(layer.weight.dtype):
            return super().apply(layer, x, bias)
        output = product(x, layer.weight)
        return output if bias is None else output + bias


class CompiledHeadMethod(UnquantizedEmbeddingMethod):
    """The same for the product with the head, which an embedding may be as well."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not is_quicker(layer.weight.dtype):
            return super().apply(layer, x, bias)
        output = product(x, layer.weight)
        return output if bias is None else output + bias


def choose_products(model: nn.Module) -> None:
    """As `devices.base.Device.choose_products`."""
    module: Any
    for module in model.modules():
        method = type(getattr(module, "quant_method", None))
        if method is UnquantizedLinearMethod:
            module.quant_method = CompiledLinearMethod()
        elif method is UnquantizedEmbeddingMethod and isinstance(module, VocabParallelEmbedding):
            module.quant_method = CompiledHeadMethod()
