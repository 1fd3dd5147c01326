"""Linear layers and the head on a CPU without products in bf16, where oneDNN and torch multiply row by row."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.utils.torch_utils import direct_register_custom_op

from longcat_core.kernels.cpu.product import is_quicker, product


class CompiledLinearMethod(UnquantizedLinearMethod):
    """vLLM's method, with core's product in place of the one that it chooses for a CPU."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if not _take(layer):
            super().process_weights_after_loading(layer)


class CompiledHeadMethod(UnquantizedEmbeddingMethod):
    """The same for the product with the head."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if not _take(layer):
            super().process_weights_after_loading(layer)


def choose_products(model: nn.Module) -> None:
    """As `devices.base.Device.choose_products`."""
    module: Any
    for module in model.modules():
        method = type(getattr(module, "quant_method", None))
        if method is UnquantizedLinearMethod:
            module.quant_method = CompiledLinearMethod()
        elif method is UnquantizedEmbeddingMethod and isinstance(module, ParallelLMHead):
            module.quant_method = CompiledHeadMethod()


def _take(layer: Any) -> bool:
    """Whether core's product is used for a layer. `kv_b_proj`, which attention has taken apart, is left to vLLM."""
    is_taken = is_quicker(layer.weight.dtype) and not getattr(layer, "_cpu_skip_gemm_dispatch", False)
    if is_taken:
        layer.cpu_linear = _linear
    return is_taken


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.longcat.cpu_product(x, weight)
    return output if bias is None else output + bias


def _product_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_LIBRARY = torch.library.Library("longcat", "FRAGMENT")
direct_register_custom_op("cpu_product", product, fake_impl=_product_fake, target_lib=_LIBRARY)
