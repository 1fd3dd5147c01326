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
            reduce_results=False,  # `forward` does
        )

    def forward(self, hidden_states: Tensor, partial: Tensor | None = None) -> Tensor:
        """[T, H] -> [T, H]. partial: this rank's part of a sum over ranks, which is then made of both at once."""
        gate_up, _ = self.gate_up_proj(hidden_states)
        output, _ = self.down_proj(self.act_fn(gate_up))
        if partial is not None:
            output = output + partial
        return tensor_model_parallel_all_reduce(output)
