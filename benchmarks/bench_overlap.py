"""A layer's exchange of tokens beside its dense FFNs, and one after the other, over links of several rates."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import record
from longcat_core.layers.experts import grouped_ffn, routed_experts
from longcat_core.parallel.exchange import AllToAll, Exchange

HIDDEN, FFN, INNER = 1024, 2048, 256
EXPERTS, ZERO, TOP_K = 32, 16, 6
RANKS, TURNS = 2, 15
TOKENS = (16, 64, 256)
RATES: tuple[float | None, ...] = (None, 1e9, 1e8, 2e7)
"""Bytes a second; None leaves the link as it is."""


class Times(NamedTuple):
    """Seconds of one layer."""

    whole: float
    waited: float
    """For other ranks' tokens and for the sums of experts."""
    dense: float
    """In the dense FFNs."""


class LimitedLink(AllToAll):
    rate: float | None = None

    def transfer(self, output: Tensor, rows: Tensor, expected: list[int] | None, counts: list[int] | None) -> None:
        super().transfer(output, rows, expected, counts)
        if self.rate is not None:
            time.sleep(output.nbytes / self.rate)


def main() -> None:
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        torch.multiprocessing.spawn(run, (port, folder), RANKS)
        rows: list[dict[str, Any]] = json.loads((Path(folder) / "rows").read_text())
    table = Table(*rows[0], title="milliseconds of a layer")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=160).print(table)
    sizes = {"hidden": HIDDEN, "ffn": FFN, "expert_ffn": INNER, "experts": EXPERTS, "zero_experts": ZERO}
    print(record.write("overlap", rows, ranks=RANKS, threads_of_a_rank=1, turns=TURNS, top_k=TOP_K, **sizes))


def run(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    assert dist.group.WORLD is not None
    link = LimitedLink(dist.group.WORLD)
    exchange = Exchange(link, torch.arange(EXPERTS) * RANKS // EXPERTS)
    generator = torch.Generator().manual_seed(rank)
    gate_up, down = torch.randn(2 * FFN, HIDDEN) / HIDDEN**0.5, torch.randn(HIDDEN, FFN) / FFN**0.5
    experts = grouped_ffn(
        torch.randn(EXPERTS, 2 * INNER, HIDDEN) / HIDDEN**0.5, torch.randn(EXPERTS, HIDDEN, INNER) / INNER**0.5
    )

    def layer(hidden_states: Tensor, ids: Tensor, weights: Tensor, is_beside: bool) -> Times:
        spent = {"waited": 0.0, "dense": 0.0}

        def timed(name: str, step: Callable[[], Any]) -> Any:
            begun = time.perf_counter()
            result = step()
            spent[name] += time.perf_counter() - begun
            return result

        def dense() -> None:
            gate, up = F.linear(hidden_states, gate_up).chunk(2, dim=-1)
            F.linear(F.silu(gate) * up, down)

        dist.barrier()
        started = time.perf_counter()
        dispatch = exchange.dispatch(hidden_states, ids, weights)
        if is_beside:
            timed("dense", dense)
        timed("waited", dispatch.on_its_way.result)
        choices = exchange.received(dispatch)
        combine = exchange.combine(dispatch, routed_experts(*choices, experts))
        if is_beside:
            timed("dense", dense)
        timed("waited", combine.on_its_way.result)
        exchange.combined(combine)
        if not is_beside:
            timed("dense", dense)
            timed("dense", dense)
        return Times(time.perf_counter() - started, **spent)

    rows = []
    for tokens in TOKENS:
        chosen = torch.rand(tokens, EXPERTS + ZERO, generator=generator).argsort(dim=1)[:, :TOP_K]
        ids = torch.where(chosen < EXPERTS, chosen, -1).int()
        given = (torch.randn(tokens, HIDDEN, generator=generator), ids, torch.rand(tokens, TOP_K))
        for rate in RATES:
            link.rate = rate
            before = link.sent_bytes
            layer(*given, is_beside=True)
            sent = link.sent_bytes - before
            turns = [(layer(*given, is_beside=False), layer(*given, is_beside=True)) for _ in range(TURNS)]
            in_a_row, beside = (
                Times(*(statistics.median(values) for values in zip(*times, strict=True)))
                for times in zip(*turns, strict=True)
            )
            rows.append(
                {
                    "tokens a rank": tokens,
                    "link, MB/s": "loopback" if rate is None else round(rate / 1e6),
                    "kB sent": round(sent / 1e3),
                    "all-gather, kB": round(tokens * (RANKS - 1) * (2 * HIDDEN * 4 + TOP_K * 8) / 1e3),
                    "in a row": round(in_a_row.whole * 1e3, 2),
                    "beside": round(beside.whole * 1e3, 2),
                    "waits in a row": round(in_a_row.waited * 1e3, 2),
                    "waits beside": round(beside.waited * 1e3, 2),
                    "dense FFNs": round(in_a_row.dense * 1e3, 2),
                    "hidden of what fits": round(
                        (in_a_row.waited - beside.waited) / min(in_a_row.waited, in_a_row.dense), 2
                    ),
                    "time in a row over beside": round(statistics.median(a.whole / b.whole for a, b in turns), 2),
                }
            )
    if rank == 0:
        (Path(folder) / "rows").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
