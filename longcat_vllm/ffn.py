"""The dense FFN, whose sum over ranks takes the experts' along."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig


class LongcatFFN(nn.Module):
    """Dense SwiGLU."""

    def __init__(self, hidden: int, intermediate: int, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [intermediate] * 2, bias=False, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj"
        )
        self.act_fn = SiluAndMul()
        self.down_proj = RowParallelLinear(
            intermediate,
            hidden,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
            reduce_results=False,  # `summed` does
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.summed(self.partial(hidden_states))

    def partial(self, hidden_states: Tensor) -> Tensor:
        """This rank's part of the output, [T, H]."""
        gate_up, _ = self.gate_up_proj(hidden_states)
        output, _ = self.down_proj(self.act_fn(gate_up))
        return output

    def summed(self, partial: Tensor, others: Tensor | None = None) -> Tensor:
        """The sum over ranks, of both parts at once if there are `others`."""
        return tensor_model_parallel_all_reduce(partial if others is None else partial + others)
