"""Linear layers and the head on a CPU: core's products of few rows, and of any where torch has none in bf16."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.utils.torch_utils import direct_register_custom_op

from longcat_core.kernels.cpu.experts import CompiledFFN
from longcat_core.kernels.cpu.library import has_tiles
from longcat_core.kernels.cpu.product import Projection, is_quicker_than_torch, product

if TYPE_CHECKING:
    from longcat_vllm.ffn import LongcatFFN


class _Compiled:
    """Core's product in place of the one that vLLM chooses, but for `kv_b_proj`, which attention takes apart."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if self._is_ours(layer) and not getattr(layer, "_cpu_skip_gemm_dispatch", False):
            layer.cpu_linear = _linear
        else:
            super().process_weights_after_loading(layer)  # type: ignore[misc]  # vLLM's class comes next

    def _is_ours(self, layer: Any) -> bool:
        return is_quicker_than_torch(layer.weight.dtype, rows=1) and not has_tiles()


class CompiledLinearMethod(_Compiled, UnquantizedLinearMethod):
    pass


class CompiledHeadMethod(_Compiled, UnquantizedEmbeddingMethod):
    pass


class DrafterLinearMethod(CompiledLinearMethod):
    """Core's with AMX, too: a draft is of one row a request, and what packing gains many rows does not pay for it."""

    def _is_ours(self, layer: Any) -> bool:
        return is_quicker_than_torch(layer.weight.dtype, rows=1)


METHODS: dict[type, type] = {
    UnquantizedLinearMethod: CompiledLinearMethod,
    UnquantizedEmbeddingMethod: CompiledHeadMethod,
}
DRAFTER_METHODS = METHODS | {UnquantizedLinearMethod: DrafterLinearMethod}


def projection(layer: Any) -> Projection | None:
    """A linear layer's weight, if core's kernels take it as it is."""
    is_ours = getattr(layer, "cpu_linear", None) is _linear
    return Projection(layer.weight) if is_ours and layer.weight.dtype == torch.bfloat16 else None


def compiled_ffn(ffn: LongcatFFN) -> CompiledFFN | None:
    """A dense FFN of few tokens in one call, if core's kernels take both weights."""
    gate_up, down = projection(ffn.gate_up_proj), projection(ffn.down_proj)
    return None if gate_up is None or down is None else CompiledFFN.of(gate_up, down)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert bias is None, "no layer of LongCat-Flash has a bias"
    output: Tensor = torch.ops.longcat.cpu_product(x, weight)
    return output


def _product(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    if scales is None and not is_quicker_than_torch(weight.dtype, x.shape[:-1].numel()):
        return F.linear(x, weight)
    return product(x, weight, scales)


def _product_fake(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_LIBRARY = torch.library.Library("longcat", "FRAGMENT")
direct_register_custom_op("cpu_product", _product, fake_impl=_product_fake, target_lib=_LIBRARY)
