"""Time of a dense projection and of a layer's experts on a CPU: torch's over ours, and ours in bf16 over ours in FP8.

With weights that come from memory. `floor` is what is read once over the memory's bandwidth, or the operations
over the best rate of a product that was measured, where that is longer. For the experts: 64 FFN and 32 zero experts, 12
choices a token at random; beside ours vLLM's own kernel in its environment, and in SGLang's one product an expert.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import record
from longcat_core.kernels.cpu import library
from longcat_core.kernels.cpu.experts import CompiledExperts
from longcat_core.kernels.cpu.product import product
from longcat_core.layers.experts import ExpertFFN, grouped_ffn, routed_experts
from longcat_core.planning.calibration import SIZES, calibrate
from longcat_core.quantization import PUBLISHED_BLOCK
from longcat_core.weights.blocks import FP8, scale_shape

SHAPES = [(4096, 1024), (1024, 2048), (8192, 1024)]
"""Rows and columns: gate and up projection, down projection and head of the 622 M model of `bench_floor.py`."""
HIDDEN, INNER, EXPERTS, ZERO_EXPERTS, TOP_K = 1024, 384, 64, 32, 12
TOKENS = (1, 2, 4, 8, 16, 64, 256)
BYTES = 1 << 28
"""Of weights that are used in turn."""


def main(pairs: int = 9, seconds: float = 0.1) -> None:
    figures: Any = calibrate(SIZES, load=lambda: (0.0,))["figures"]
    bandwidth = figures["memory_gb_per_s"]["value"] * 1e9
    rate = fp32_or_bf16_rate()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for (height, width), tokens in itertools.product(SHAPES, TOKENS):
            times = _dense(height, width, tokens, bandwidth, rate, pairs, seconds)
            rows.append({"what": f"{height} x {width}", "tokens": tokens} | times)
        for tokens in TOKENS:
            rows.append({"what": "experts", "tokens": tokens} | _experts(tokens, bandwidth, rate, pairs, seconds))
    title = f"{library.description()}, {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOPS"
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=140).print(table)
    settings = {"gb_per_s": round(bandwidth / 1e9, 1), "gflops": round(rate / 1e9), "pairs": pairs}
    print(record.write("products", rows, instruction_set=library.description(), **settings))


def fp32_or_bf16_rate() -> float:
    """Operations a second of torch's product in fp32 with 512 rows, or of ours in bf16, whichever is quicker."""
    x, weight = torch.randn(512, 2048), torch.randn(4096, 2048)
    halves = x.bfloat16(), weight.bfloat16()
    times = record.paired_times(lambda: F.linear(x, weight), lambda: product(*halves), 9, 0.2)
    return 2 * 512 * weight.numel() / min(record.medians(times)[:2])


def _dense(
    height: int, width: int, tokens: int, bandwidth: float, rate: float, pairs: int, seconds: float
) -> dict[str, float]:
    weights = [torch.randn(height, width).bfloat16() for _ in range(BYTES // (2 * height * width))]
    x, turns = torch.randn(tokens, width).bfloat16(), itertools.cycle(weights)
    scales = torch.rand(scale_shape((height, width), PUBLISHED_BLOCK))
    in_fp8 = itertools.cycle([weight.to(FP8) for weight in weights])
    floor = max(2 * height * width / bandwidth, 2 * tokens * height * width / rate)
    return _ratios(
        lambda: F.linear(x, next(turns)),
        lambda: product(x, next(turns)),
        lambda: product(x, next(in_fp8), scales),
        floor,
        pairs,
        seconds,
    )


def _experts(tokens: int, bandwidth: float, rate: float, pairs: int, seconds: float) -> dict[str, float]:
    each = 3 * HIDDEN * INNER
    layers = [
        ((torch.randn(EXPERTS, 2 * INNER, HIDDEN) * 0.03).bfloat16(), torch.randn(EXPERTS, HIDDEN, INNER).bfloat16())
        for _ in range(max(2, BYTES // (2 * EXPERTS * each)))
    ]
    ids = torch.rand(tokens, EXPERTS + ZERO_EXPERTS).topk(TOP_K).indices.int()
    ids.masked_fill_(ids >= EXPERTS, -1)
    kept = ids[ids >= 0]
    x, shares = torch.randn(tokens, HIDDEN).bfloat16(), torch.rand(tokens, TOP_K)
    floor = max(2 * each * len(kept.unique()) / bandwidth, 2 * each * len(kept) / rate)

    def in_fp8(w13: Tensor, w2: Tensor) -> ExpertFFN:
        scales = (torch.rand(EXPERTS, *scale_shape(each.shape[1:], PUBLISHED_BLOCK)) for each in (w13, w2))
        return CompiledExperts(w13.to(FP8), w2.to(FP8), *scales)

    def calls(make: Callable[[Tensor, Tensor], ExpertFFN]) -> Callable[[], Tensor]:
        turns = itertools.cycle([make(*weights) for weights in layers])
        return lambda: routed_experts(x, ids, shares, next(turns))

    return _ratios(calls(_engines), calls(CompiledExperts), calls(in_fp8), floor, pairs, seconds)


def _engines(w13: Tensor, w2: Tensor) -> ExpertFFN:
    if record.ENGINE == "sglang":
        return grouped_ffn(w13, w2)
    from longcat_vllm.devices.cpu.experts import CPU_KERNELS

    kernel = CPU_KERNELS["bf16_dot" if library.multiplies_bf16() else "vector"]
    return kernel.ffn(kernel.pack(w13), kernel.pack(w2))


def _ratios(
    theirs: Callable[[], Tensor],
    ours: Callable[[], Tensor],
    in_fp8: Callable[[], Tensor],
    floor: float,
    pairs: int,
    seconds: float,
) -> dict[str, float]:
    _, taken, ratio = record.medians(record.paired_times(theirs, ours, pairs, seconds))
    gain = record.medians(record.paired_times(ours, in_fp8, pairs, seconds))[2]
    return {
        "ms": round(taken * 1e3, 3),
        "floor, ms": round(floor * 1e3, 3),
        "floor / ms": round(floor / taken, 2),
        "theirs / ours": round(ratio, 2),
        "bf16 / FP8": round(gain, 2),
    }


if __name__ == "__main__":
    typer.run(main)
