"""Time of one MLA on a CPU over its floor, by context and batch: decoding, and prompts.

LongCat-Flash-Chat's attention with some of its heads, in bf16, by `longcat_core.kernels.cpu.attention`. The floor is
what is read once, weights and cache, over the memory's bandwidth, or the operations over the best rate of a product
that was measured in the run, where that is longer. Beside it, in pairs, torch, by
`longcat_core.layers.latent_attention`, and for decoding vLLM's own CPU_MLA in its environment: its kernel between two
batched products with the absorbed weights.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import record
from benchmarks.bench_products import fp32_or_bf16_rate
from longcat_core.kernels.cpu import library
from longcat_core.kernels.cpu.attention import paged_attention
from longcat_core.layers import latent_attention
from longcat_core.layers.latent_attention import PagedBatch, UpProjection
from longcat_core.planning.calibration import SIZES, calibrate

NOPE, ROPE, LATENT, VALUE = 128, 64, 512, 128
LAYERS = 8
"""Whose weights are used in turn, so that they come from memory."""
DECODING = [(16, 1), (16, 8), (64, 1), (64, 8)]
"""Heads and requests."""
CONTEXTS = (128, 2048, 8192, 32768, 131072)
PROMPTS = [(16, 512), (64, 512), (16, 2048)]
"""Heads and tokens."""


def main(passes: int = 7) -> None:
    figures = calibrate(SIZES, load=lambda: (0.0,))["figures"]
    bandwidth = figures["memory_gb_per_s"]["value"] * 1e9  # type: ignore[index]
    rate = fp32_or_bf16_rate()
    rows = []
    for (heads, requests), context in itertools.product(DECODING, CONTEXTS):
        read = 2 * (heads * (NOPE + VALUE) * LATENT + requests * context * (LATENT + ROPE))
        done = 2 * requests * heads * (LATENT * (NOPE + VALUE) + context * (2 * LATENT + ROPE))
        rows.append({"heads": heads, "requests": requests, "context": context, "new": 1})
        rows[-1] |= measured(heads, requests, context, 1, max(read / bandwidth, done / rate), passes)
    for heads, tokens in PROMPTS:
        expanded = tokens * LATENT * heads * (NOPE + VALUE)
        attended = tokens * tokens // 2 * heads * (NOPE + ROPE + VALUE)
        rows.append({"heads": heads, "requests": 1, "context": tokens, "new": tokens})
        rows[-1] |= measured(heads, 1, tokens, tokens, 2 * (expanded + attended) / rate, passes)
    table = Table(*rows[0], title=f"{library.description()}, {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOPS")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=140).print(table)
    settings = {"gb_per_s": round(bandwidth / 1e9, 1), "gflops": round(rate / 1e9), "passes": passes}
    print(record.write("attention", rows, instruction_set=library.description(), **settings))


def measured(heads: int, requests: int, context: int, new: int, floor_s: float, passes: int) -> dict[str, float | None]:
    """Milliseconds of a call, and ratios of pairs that ran side by side."""
    weights = [torch.randn(heads * (NOPE + VALUE), LATENT).mul_(LATENT**-0.5).bfloat16() for _ in range(LAYERS)]
    cache = torch.randn(requests * context, LATENT + ROPE).bfloat16()
    table = torch.arange(requests * context).view(requests, context)
    batch = PagedBatch(range(0, requests * new + 1, new), [context] * requests, table, 1)
    queries = torch.randn(requests * new, heads, NOPE + ROPE).bfloat16()

    def calls(attention: Callable[..., Tensor], ups: list[UpProjection]) -> Callable[[], Tensor]:
        turns = itertools.cycle(ups)
        return lambda: attention(queries, cache, batch, next(turns), 0.1)

    ups = [UpProjection.of(weight, heads, NOPE) for weight in weights]
    ours, torchs = calls(paged_attention, ups), calls(latent_attention.paged_attention, ups)
    vllms = None
    if record.ENGINE == "vllm" and new == 1:
        vllms = vllms_decoding(queries, cache, requests, context, ups)
    with torch.inference_mode():
        _seconds(ours), _seconds(torchs)
        times = [(_seconds(ours), _seconds(torchs), _seconds(vllms) if vllms else 0.0) for _ in range(passes)]
    taken = statistics.median(each for each, _, _ in times)
    return {
        "ms": round(taken * 1e3, 2),
        "floor, ms": round(floor_s * 1e3, 2),
        "floor / ms": round(floor_s / taken, 2),
        "torch / ours": round(statistics.median(other / each for each, other, _ in times), 2),
        "vLLM / ours": round(statistics.median(other / each for each, _, other in times), 2) if vllms else None,
    }


def vllms_decoding(
    queries: Tensor, cache: Tensor, requests: int, context: int, ups: list[UpProjection]
) -> Callable[[], Tensor]:
    """CPU_MLA of vLLM 0.32, which has blocks of 16 tokens."""
    from vllm import _custom_ops as ops

    blocks, lengths = context // 16, torch.full((requests,), context, dtype=torch.int32)
    table = torch.arange(requests * blocks, dtype=torch.int32).view(requests, blocks)
    pages, heads = cache.view(-1, 16, LATENT + ROPE), queries.shape[1]
    halves = itertools.cycle([(up.w_uk.contiguous(), up.w_uv.transpose(1, 2).contiguous()) for up in ups])

    def decode() -> Tensor:
        w_uk, w_uv = next(halves)
        q_nope, q_rope = queries.split([NOPE, ROPE], dim=-1)
        absorbed = torch.cat((torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1), q_rope), dim=-1)
        output = queries.new_empty(requests, heads, LATENT)
        ops.mla_decode_kvcache_cpu(output, absorbed, pages, 0.1, table, lengths)
        return torch.bmm(output.transpose(0, 1), w_uv).transpose(0, 1)

    return decode


def _seconds(call: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    typer.run(main)
