"""FFN experts on a CPU: core's packed experts over rows of FFN experts only."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from torch import Tensor

from longcat_core.kernels.cpu.experts import CompiledExperts
from longcat_core.kernels.cpu.library import is_available
from longcat_core.kernels.packed_experts import PackedExperts, is_supported
from longcat_core.layers.experts import ExpertFFN, grouped_ffn, routed_experts


class CompactedRowsMethod(UnquantizedFusedMoEMethod):
    """Unquantised experts on a CPU, over rows of local FFN experts only.

    SGLang's path without `sgl_kernel` (moe/fused_moe_native.py) indexes with ids, so it cannot take -1.

    A layer's weights are in its parameters, where SGLang reads and writes them, or packed for the kernel. SGLang has
    loaders that pack before they load, and others that never do, so weights are packed at their first use, unless they
    are already, and unpacked when the layer's state is read.
    """

    ffn: ExpertFFN | None = None

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        layer.register_state_dict_pre_hook(lambda layer, *_: self.restore_weights_before_loading(layer))

    def process_weights_after_loading(self, layer: Any) -> None:
        if isinstance(self.ffn, PackedExperts):
            return
        kernel = select_cpu_kernel(layer.w13_weight.dtype)
        self.ffn = CPU_KERNELS[kernel](layer.w13_weight.data, layer.w2_weight.data)
        if isinstance(self.ffn, PackedExperts):  # which has copies
            layer.w13_weight.data, layer.w2_weight.data = layer.w13_weight.new_empty(0), layer.w2_weight.new_empty(0)

    def restore_weights_before_loading(self, layer: Any) -> None:
        """Undo `process_weights_after_loading`."""
        if isinstance(self.ffn, PackedExperts):
            layer.w13_weight.data, layer.w2_weight.data = self.ffn.unpack()
        self.ffn = None

    def experts_of(self, layer: Any) -> CompiledExperts | None:
        """The experts of a layer, if the compiled kernel is chosen."""
        if self.ffn is None:
            self.process_weights_after_loading(layer)
        return self.ffn if isinstance(self.ffn, CompiledExperts) else None

    def apply(  # type: ignore[override]  # narrower than linear layers', as UnquantizedFusedMoEMethod's
        self, layer: Any, dispatch_output: StandardDispatchOutput
    ) -> StandardCombineInput:
        if self.ffn is None:
            self.process_weights_after_loading(layer)
        assert self.ffn is not None
        assert isinstance(dispatch_output.topk_output, StandardTopKOutput)
        weights, ids, _ = dispatch_output.topk_output
        return StandardCombineInput(routed_experts(dispatch_output.hidden_states, ids, weights, self.ffn))


def select_cpu_kernel(dtype: torch.dtype) -> str:
    """The quickest kernel on this CPU: `compiled`, `packed` or, for any dtype, `torch`."""
    if dtype == torch.bfloat16 and is_available():
        return "compiled"
    return "packed" if is_supported(dtype) else "torch"


CPU_KERNELS: dict[str, Callable[[Tensor, Tensor], ExpertFFN]] = {
    "compiled": CompiledExperts,
    "packed": PackedExperts,
    "torch": grouped_ffn,
}
