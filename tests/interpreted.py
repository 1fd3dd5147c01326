"""What both engines' tests of MoE kernels in Triton's interpreter share: the process, layers, and their truth."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longcat_core.layers.experts import grouped_ffn, routed_experts
from longcat_core.layers.routing import Routing, route
from longcat_core.weights.blocks import dequantize_blocks, quantize_blocks
from tests.oracle import relative_error

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton must be told before it is imported, and other tests, and the servers that they start, must not have it."""


def run_interpreted(folder: Path) -> None:
    """All tests of a folder pass in a process of their own, whose Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--confcutdir={folder}", str(folder)]
    run = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-10000:] + run.stderr[-2000:]


@dataclass(frozen=True)
class Experts:
    """Of a layer: in FP8 with the scales of 128 x 128 blocks."""

    w13: Tensor
    w2: Tensor
    w13_scales: Tensor | None = None
    w2_scales: Tensor | None = None

    def of_rank(self, rank: int, ranks: int) -> Experts:
        mine = slice(rank * len(self.w13) // ranks, (rank + 1) * len(self.w13) // ranks)
        scales = (None if scale is None else scale[mine] for scale in (self.w13_scales, self.w2_scales))
        return Experts(self.w13[mine].contiguous(), self.w2[mine].contiguous(), *scales)


@dataclass(frozen=True)
class Layer:
    """An MoE layer with random weights, and tokens with their routing."""

    x: Tensor
    routing: Routing
    experts: Experts
    name: str

    @classmethod
    def random(
        cls,
        tokens: int,
        routed: int,
        zero: int,
        top_k: int,
        *,
        hidden: int = 64,
        inner: int = 32,
        dtype: torch.dtype = torch.float32,
        are_all_zero: bool = False,
        is_fp8: bool = False,
        name: str = "",
    ) -> Layer:
        generator = torch.Generator().manual_seed(tokens + routed)
        bias = torch.zeros(routed + zero)
        if are_all_zero:
            bias[routed:] = 9.0
        logits = torch.randn(tokens, routed + zero, generator=generator)
        routing = route(logits, bias, n_routed_experts=routed, top_k=top_k, routed_scaling_factor=2.5)
        assert (routing.ids < 0).any()
        w13 = torch.randn(routed, 2 * inner, hidden, generator=generator) * hidden**-0.5
        w2 = torch.randn(routed, hidden, inner, generator=generator) * inner**-0.5
        experts = Experts(w13.to(dtype), w2.to(dtype))
        if is_fp8:
            (w13, w13_scales), (w2, w2_scales) = quantized(w13), quantized(w2)
            experts = Experts(w13, w2, w13_scales, w2_scales)
        return cls(torch.randn(tokens, hidden, generator=generator).to(dtype), routing, experts, name)

    def truth(self, rank: int = 0, ranks: int = 1) -> Tensor:
        """The share of a rank's FFN experts, in fp64: core's `moe` without `identity * x`."""
        expert_map, experts = self.expert_map(rank, ranks), self.experts.of_rank(rank, ranks)
        w13, w2 = dequantized(experts.w13, experts.w13_scales), dequantized(experts.w2, experts.w2_scales)
        ffn = grouped_ffn(w13.double(), w2.double())
        return routed_experts(self.x.double(), self.routing.ids, self.routing.weights.double(), ffn, expert_map)

    def expert_map(self, rank: int, ranks: int) -> Tensor:
        local = len(self.experts.w13) // ranks
        expert_map = torch.full((len(self.experts.w13),), -1, dtype=torch.int32)
        expert_map[rank * local : (rank + 1) * local] = torch.arange(local, dtype=torch.int32)
        return expert_map

    def is_dropped(self, rank: int = 0, ranks: int = 1) -> Tensor:
        """Of each choice [T, K], whether no row of this rank's is for it."""
        local = self.expert_map(rank, ranks)[self.routing.ids.clamp(min=0)]
        return (self.routing.ids < 0) | (local < 0)

    def error(self, output: Tensor, rank: int = 0, ranks: int = 1) -> float:
        """NaN if the output has one."""
        truth = self.truth(rank, ranks)
        return float(output.double().abs().max()) if not truth.any() else relative_error(output, truth)


def quantized(weights: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = zip(*(quantize_blocks(weight) for weight in weights), strict=True)
    return torch.stack(codes), torch.stack(scales)


def dequantized(weights: Tensor, scales: Tensor | None) -> Tensor:
    if scales is None:
        return weights
    return torch.stack([dequantize_blocks(weight, scale) for weight, scale in zip(weights, scales, strict=True)])


def layers(dtype: torch.dtype) -> list[Layer]:
    """Few and many tokens, one token, published numbers of experts with small ones, zero experts alone."""
    return [
        Layer.random(33, 8, 4, 4, dtype=dtype, name="33 tokens"),
        Layer.random(1, 8, 4, 4, dtype=dtype, name="one token"),
        Layer.random(9, 8, 4, 4, dtype=dtype, are_all_zero=True, name="zero experts alone"),
        Layer.random(5, 512, 256, 12, dtype=dtype, name="512 and 256 experts"),
    ]


def fp8_layer(dtype: torch.dtype) -> Layer:
    return Layer.random(7, 4, 3, 3, hidden=256, inner=128, dtype=dtype, is_fp8=True, name="FP8")


ERROR_OF_FP8 = 0.08
"""Of a sum whose terms are products of numbers in e4m3, which has 3 bits of mantissa: typical 0.03."""
