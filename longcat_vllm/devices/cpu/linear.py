"""Linear layers and the head on a CPU without products in bf16, where oneDNN and torch multiply row by row."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.utils.torch_utils import direct_register_custom_op

from longcat_core.kernels.cpu.product import is_quicker, product


class _Compiled:
    """Core's product in place of the one that vLLM chooses, but for `kv_b_proj`, which attention takes apart."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if is_quicker(layer.weight.dtype) and not getattr(layer, "_cpu_skip_gemm_dispatch", False):
            layer.cpu_linear = _linear
        else:
            super().process_weights_after_loading(layer)  # type: ignore[misc]  # vLLM's class comes next


class CompiledLinearMethod(_Compiled, UnquantizedLinearMethod):
    pass


class CompiledHeadMethod(_Compiled, UnquantizedEmbeddingMethod):
    pass


METHODS: dict[type, type] = {
    UnquantizedLinearMethod: CompiledLinearMethod,
    UnquantizedEmbeddingMethod: CompiledHeadMethod,
}


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert bias is None, "no layer of LongCat-Flash has a bias"
    output: Tensor = torch.ops.longcat.cpu_product(x, weight)
    return output


def _product_fake(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_LIBRARY = torch.library.Library("longcat", "FRAGMENT")
direct_register_custom_op("cpu_product", product, fake_impl=_product_fake, target_lib=_LIBRARY)
