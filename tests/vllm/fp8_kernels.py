"""vLLM's FP8 kernels for CPUs with AVX-512, as torch computes them, and a CPU for which core has none, for tests."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longcat_core.layers.experts import grouped_ffn
from longcat_core.quantization import PUBLISHED_BLOCK
from longcat_core.weights.blocks import dequantize_blocks
from longcat_vllm.devices.cpu import fp8

FP8_W8A16 = 2
"""`CPUQuantMethod.FP8_W8A16`."""


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As on a processor with products in bf16; the names of the kernels that this machine lacks and that are called."""
    called: list[str] = []
    monkeypatch.setattr(fp8, "multiplies_bf16", lambda: True)

    def fp8_scaled_mm_cpu(
        rows: Tensor, weight: Tensor, scales: Tensor, block: list[int], bias: None, dtype: torch.dtype, is_packed: bool
    ) -> Tensor:
        assert (rows.dtype, dtype, block, bias, is_packed) == (torch.bfloat16, torch.bfloat16, [128, 128], None, True)
        assert rows.dim() == 2
        assert rows.stride(1) == 1
        assert rows.stride(0) % 2 == 0, "the kernel reads other numbers"
        assert len(rows), "the kernel ends the process"
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
        assert experts.shape == weights.shape
        assert all(each.is_contiguous() for each in (rows, experts, weights))
        assert (experts >= 0).all()
        called.append("fused_experts_cpu")
        w13 = torch.stack([dequantize_blocks(*each) for each in zip(w13, w13_scales, strict=True)])
        w2 = torch.stack([dequantize_blocks(*each) for each in zip(w2, w2_scales, strict=True)])
        outputs.copy_(grouped_ffn(w13, w2)(rows.float(), experts, weights))

    for kernel in (fp8_scaled_mm_cpu, fused_experts_cpu):
        if not hasattr(torch.ops._C, kernel.__name__):
            monkeypatch.setattr(torch.ops._C, kernel.__name__, kernel, raising=False)
    if not hasattr(torch.ops._C, "convert_weight_packed"):
        monkeypatch.setattr(torch.ops._C, "convert_weight_packed", Tensor.clone, raising=False)
    return called


def remove_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a compiler."""
    monkeypatch.setattr(fp8, "takes_fp8", lambda dtype: False)
