"""Time of one MLA on a CPU over its floor, by context and batch: decoding, and prompts.

LongCat-Flash-Chat's attention with some of its heads, in bf16, by `longcat_core.layers.latent_attention`. The floor of
decoding is what it reads once, weights and cache, over the memory's bandwidth; that of a prompt its products over the
rate of a product of 512 rows; both measured in the same run. `as published` is the same function on views of
`kv_b_proj` as it is published, instead of weights that are laid out for their products.
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
from longcat_core.layers.latent_attention import PagedBatch, UpProjection, paged_attention
from longcat_core.planning.calibration import SIZES, calibrate

NOPE, ROPE, LATENT, VALUE = 128, 64, 512, 128
LAYERS = 8
"""Whose weights are used in turn, so that they come from memory."""
DECODING = [(16, 1), (16, 8), (64, 1), (64, 8)]
"""Heads and requests."""
CONTEXTS = (128, 2048, 8192, 32768)
PROMPTS = [(16, 512), (64, 512), (16, 2048)]
"""Heads and tokens."""


def main(passes: int = 7) -> None:
    figures = calibrate(SIZES, load=lambda: (0.0,))["figures"]
    bandwidth = figures["memory_gb_per_s"]["value"] * 1e9  # type: ignore[index]
    rate = figures["product_bf16_512_rows_gflops"]["value"] * 1e9  # type: ignore[index]
    rows = []
    for (heads, requests), context in itertools.product(DECODING, CONTEXTS):
        read = 2 * (heads * (NOPE + VALUE) * LATENT + requests * context * (LATENT + ROPE))
        rows.append({"heads": heads, "requests": requests, "context": context, "new": 1})
        rows[-1] |= measured(heads, requests, context, 1, read / bandwidth, passes)
    for heads, tokens in PROMPTS:
        expanded = tokens * LATENT * heads * (NOPE + VALUE)
        attended = tokens * tokens // 2 * heads * (NOPE + ROPE + VALUE)
        rows.append({"heads": heads, "requests": 1, "context": tokens, "new": tokens})
        rows[-1] |= measured(heads, 1, tokens, tokens, 2 * (expanded + attended) / rate, passes)
    table = Table(*rows[0], title=f"{bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOPS")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=140).print(table)
    print(record.write("attention", rows, gb_per_s=round(bandwidth / 1e9, 1), gflops=round(rate / 1e9), passes=passes))


def measured(heads: int, requests: int, context: int, new: int, floor_s: float, passes: int) -> dict[str, float]:
    """Milliseconds of a call, and ratios of pairs that ran side by side."""
    weights = [torch.randn(heads * (NOPE + VALUE), LATENT).mul_(LATENT**-0.5).bfloat16() for _ in range(LAYERS)]
    cache = torch.randn(requests * context, LATENT + ROPE).bfloat16()
    table = torch.arange(requests * context).view(requests, context)
    batch = PagedBatch.build(range(0, requests * new + 1, new), [context] * requests, table, 1)
    queries = torch.randn(requests * new, heads, NOPE + ROPE).bfloat16()

    def calls(ups: list[UpProjection]) -> Callable[[], Tensor]:
        turns = itertools.cycle(ups)
        return lambda: paged_attention(queries, cache, batch, next(turns), 0.1)

    ours = calls([UpProjection.of(weight, heads, NOPE) for weight in weights])
    views = [weight.unflatten(0, (heads, -1)).split([NOPE, VALUE], dim=1) for weight in weights]
    published = calls([UpProjection(weight, *halves) for weight, halves in zip(weights, views, strict=True)])
    with torch.inference_mode():
        _seconds(ours), _seconds(published)
        pairs = [(_seconds(ours), _seconds(published)) for _ in range(passes)]
    taken = statistics.median(each for each, _ in pairs)
    return {
        "ms": round(taken * 1e3, 2),
        "floor, ms": round(floor_s * 1e3, 2),
        "floor / ms": round(floor_s / taken, 2),
        "as published / ours": round(statistics.median(other / each for each, other in pairs), 2),
    }


def _seconds(call: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    typer.run(main)
