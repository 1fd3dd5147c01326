"""The dense FFN, whose sum over ranks takes the experts' along."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from sglang.srt.layers.moe.utils import should_skip_mlp_all_reduce
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import add_prefix
from torch import Tensor, nn

from longcat_sglang import devices


class LongcatFFN(nn.Module):
    """Dense SwiGLU."""

    compiled: Any = None
    """A device's own, once it has asked."""

    def __init__(self, hidden: int, intermediate: int, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden,
            [intermediate] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("gate_up_proj", prefix),
        )
        self.act_fn = SiluAndMul()
        self.down_proj = RowParallelLinear(
            intermediate,
            hidden,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("down_proj", prefix),
            reduce_results=False,  # `summed` does
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.summed(self.partial(hidden_states))

    def partial(self, hidden_states: Tensor) -> Tensor:
        """This rank's part of the output, [T, H]."""
        output = devices.current().dense_ffn(self, hidden_states)
        if output is None:
            gate_up, _ = self.gate_up_proj(hidden_states)
            output, _ = self.down_proj(self.act_fn(gate_up))
        return output

    def summed(self, partial: Tensor, others: Tensor | None = None) -> Tensor:
        """The sum over ranks, of both parts at once if there are `others`.

        The layer boundary may have announced that it makes the sum itself, with what comes next.
        """
        output = partial if others is None else partial + others
        if get_parallel().tp_size > 1 and not should_skip_mlp_all_reduce():
            output = tensor_model_parallel_all_reduce(output)
        return output
