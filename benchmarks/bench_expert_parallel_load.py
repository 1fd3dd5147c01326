"""Expert-parallel load: the busiest rank's GEMM rows over the mean, ours, and with zero experts remapped to expert 0.

Counted, not timed: the routing of random tokens through LongCat-Flash-Chat's router shape.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import record
from longcat_core.layers.routing import expert_rows, rank_imbalance, route

EXPERTS, ZERO, TOP_K = 512, 256, 12


def main(tokens: int = 16384, seed: int = 0) -> None:
    logits = torch.randn(tokens, EXPERTS + ZERO, generator=torch.Generator().manual_seed(seed))
    routing = route(
        logits, torch.zeros(EXPERTS + ZERO), n_routed_experts=EXPERTS, top_k=TOP_K, routed_scaling_factor=6.0
    )
    layouts = {"ours": expert_rows(routing.ids, EXPERTS), "id-0 remap": expert_rows(routing.ids.clamp(min=0), EXPERTS)}
    rows = [
        {
            "ranks": ranks,
            **{name: round(rank_imbalance(load, ranks), 2) for name, load in layouts.items()},
            "rows saved": round(1 - int(layouts["ours"].sum()) / int(layouts["id-0 remap"].sum()), 3),
        }
        for ranks in (8, 128)
    ]
    table = Table(*rows[0], title="busiest rank's rows over the mean")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
    print(record.write("expert_parallel_load", rows, tokens=tokens, experts=EXPERTS, zero=ZERO, top_k=TOP_K))


if __name__ == "__main__":
    typer.run(main)
