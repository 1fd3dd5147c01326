"""One MoE layer on the CPU: ours against the engine's own kernel, which computes zero experts as expert 0.

Both sides share router, softmax, top-k and the identity term; what differs is which GEMM rows are computed, and by
which kernel. vLLM's is the one that 0.32 picks for this CPU. SGLang's is its path without `sgl_kernel`; as that cannot
take an expert twice in a token, which the remap to expert 0 makes common, it is given one choice a row.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks import record
from longcat_core.layers.experts import ExpertFFN, add_identity, routed_experts
from longcat_core.layers.routing import Routing, route

HIDDEN, INNER, TOP_K = 1024, 512, 12
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROUTINGS = {"a third zero": 0.0, "all zero": 10.0, "no zero": -10.0}
"""What is added to the zero experts' correction bias."""


def layers(experts: int, dtype: torch.dtype, bias: Tensor) -> tuple[Callable[[Tensor, Tensor], Tensor], ...]:
    """The engine's layer and ours on the same random weights."""
    w13 = (torch.randn(experts, 2 * INNER, HIDDEN) * HIDDEN**-0.5).to(dtype)
    w2 = (torch.randn(experts, HIDDEN, INNER) * INNER**-0.5).to(dtype)
    engine_ffn, our_ffn = FFNS[record.ENGINE](w13, w2)

    def routing(logits: Tensor) -> Routing:
        return route(logits, bias, n_routed_experts=experts, top_k=TOP_K, routed_scaling_factor=6.0)

    def engine(x: Tensor, logits: Tensor) -> Tensor:
        chosen = routing(logits)
        return add_identity(engine_ffn(x, chosen.ids.clamp(min=0), chosen.weights), x, chosen.identity)

    def ours(x: Tensor, logits: Tensor) -> Tensor:
        chosen = routing(logits)
        return add_identity(routed_experts(x, chosen.ids, chosen.weights, our_ffn), x, chosen.identity)

    return engine, ours


def vllm_ffns(w13: Tensor, w2: Tensor) -> tuple[ExpertFFN, ExpertFFN]:
    from vllm import _custom_ops as ops

    from longcat_vllm.devices.cpu.experts import CPU_KERNELS, select_cpu_kernel

    isa = "amx" if w13.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else "vec"
    engine13, engine2 = ops.cpu_prepack_moe_weight(w13, isa), ops.cpu_prepack_moe_weight(w2, isa)
    kernel = CPU_KERNELS[select_cpu_kernel(HIDDEN, INNER, w13.dtype)]

    def engine(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        routed = torch.empty_like(x)
        ops.cpu_fused_moe(routed, x, engine13, engine2, None, None, weights, ids, "silu", isa)
        return routed

    return engine, kernel.ffn(kernel.pack(w13), kernel.pack(w2))


def sglang_ffns(w13: Tensor, w2: Tensor) -> tuple[ExpertFFN, ExpertFFN]:
    from longcat_sglang.devices.cpu.platform import prepare_cpu_as_for_longcat

    prepare_cpu_as_for_longcat()
    from sglang.srt.layers.moe.fused_moe_native import moe_forward_native

    from longcat_sglang.devices.cpu.experts import CPU_KERNELS, select_cpu_kernel

    layer = SimpleNamespace(num_experts=w13.shape[0], w13_weight=w13, w2_weight=w2)
    config = SimpleNamespace(apply_router_weight_on_input=False, activation="silu", gemm1_alpha=None)

    def engine(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = x.repeat_interleave(TOP_K, dim=0)
        routed = moe_forward_native(layer, rows, (weights.view(-1, 1), ids.view(-1, 1), None), config)
        return routed.unflatten(0, (-1, TOP_K)).sum(dim=1)

    return engine, CPU_KERNELS[select_cpu_kernel(w13.dtype)](w13, w2)


FFNS = {"vllm": vllm_ffns, "sglang": sglang_ffns}
"""The engine's kernel and ours, (x, ids, weights) -> routed, from the same weights."""


def main(allocations: int = 3, pairs: int = 5, seconds: float = 0.03) -> None:
    """`allocations`: how often the weights are allocated anew; their place in memory changes small batches' times."""
    torch.manual_seed(0)
    rows = []
    settings = [(d, e, r) for d in (torch.bfloat16, torch.float32) for e in (64, 128) for r in ROUTINGS]
    for dtype, experts, name in track(settings, "timing", console=Console(stderr=True)):
        bias = torch.zeros(experts + experts // 2)
        bias[experts:] = ROUTINGS[name]
        times: dict[int, list[tuple[float, float]]] = {tokens: [] for tokens in TOKENS}
        for _ in range(allocations):
            engine, ours = layers(experts, dtype, bias)
            for tokens in TOKENS:
                x = torch.randn(tokens, HIDDEN).to(dtype)
                logits = torch.randn(tokens, bias.numel())
                torch.testing.assert_close(ours(x, logits), engine(x, logits), rtol=5e-2, atol=5e-2)
                times[tokens] += record.paired_times(
                    partial(engine, x, logits), partial(ours, x, logits), pairs, seconds
                )
        for tokens in TOKENS:
            base, mine, ratio = record.medians(times[tokens])
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "experts": experts,
                    "routing": name,
                    "tokens": tokens,
                    "engine_ms": round(base * 1e3, 4),
                    "ours_ms": round(mine * 1e3, 4),
                    "ratio": round(ratio, 3),
                }
            )
    show(rows)
    sizes = {"hidden": HIDDEN, "inner": INNER, "top_k": TOP_K}
    print(record.write("moe_layer", rows, **sizes, allocations=allocations, pairs=pairs, seconds=seconds))


def show(rows: list[dict[str, object]]) -> None:
    table = Table(
        "dtype", "experts", "routing", *(f"{tokens}" for tokens in TOKENS), title="the engine's time over ours"
    )
    for start in range(0, len(rows), len(TOKENS)):
        part = rows[start : start + len(TOKENS)]
        table.add_row(
            str(part[0]["dtype"]),
            str(part[0]["experts"]),
            str(part[0]["routing"]),
            *(f"{row['ratio']:.2f}" for row in part),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
