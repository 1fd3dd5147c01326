"""What vLLM's FP8 kernels for CPUs with AVX-512 compute, in torch, for machines without them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longcat_core.quantization import PUBLISHED_BLOCK
from longcat_core.weights.blocks import dequantize_blocks

FP8_W8A16 = 2
"""`CPUQuantMethod.FP8_W8A16`."""


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put them in the place of the kernels that this machine lacks; the names of those that are then called."""
    called: list[str] = []

    def fp8_scaled_mm_cpu(
        rows: Tensor, weight: Tensor, scales: Tensor, block: list[int], bias: None, dtype: torch.dtype, is_packed: bool
    ) -> Tensor:
        assert (rows.dtype, dtype, block, bias, is_packed) == (torch.bfloat16, torch.bfloat16, [128, 128], None, True)
        assert rows.dim() == 2
        assert rows.stride(1) == 1
        assert len(weight) % 32 == 0, "the kernel ends the process"
        called.append("fp8_scaled_mm_cpu")
        return rows @ dequantize_blocks(weight, scales).bfloat16().T

    def fused_experts_cpu(
        outputs: Tensor,
        rows: Tensor,
        w13: Tensor,
        w2: Tensor,
        weights: Tensor,
        experts: Tensor,
        method: int,
        w13_scales: Tensor,
        w2_scales: Tensor,
        *rest: Any,
    ) -> None:
        assert method == FP8_W8A16
        assert rest[3] == [*PUBLISHED_BLOCK]
        assert experts.dtype == torch.int32
        assert experts.shape == weights.shape == (len(rows), 1)
        assert (experts >= 0).all()
        called.append("fused_experts_cpu")
        for row, expert in enumerate(experts.flatten().tolist()):
            gate, up = (dequantize_blocks(w13[expert], w13_scales[expert]) @ rows[row].float()).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            outputs[row] = weights[row] * (dequantize_blocks(w2[expert], w2_scales[expert]) @ inner)

    for kernel in (fp8_scaled_mm_cpu, fused_experts_cpu):
        if not hasattr(torch.ops._C, kernel.__name__):
            monkeypatch.setattr(torch.ops._C, kernel.__name__, kernel, raising=False)
    if not hasattr(torch.ops._C, "convert_weight_packed"):
        monkeypatch.setattr(torch.ops._C, "convert_weight_packed", Tensor.clone, raising=False)
    return called
