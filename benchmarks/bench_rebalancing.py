"""How long SGLang's rebalancing of experts thinks, while no request is served: our policy's time, and SGLang's default.

LongCat-Flash-Chat's shape: 28 layers of 512 FFN experts, 1,000 recorded steps, which is SGLang's default, of 96 tokens
a rank. The topics of tokens drift between the steps by which experts are where they are and those by which they are
placed again. Our ranks place a share of the layers each, so the wait is that of the rank with most. Of the layers four
are drawn and timed, and 28 layers are computed from their mean, and from the slowest for one rank's share.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import typer
from numpy.random import default_rng

from benchmarks import record
from benchmarks.bench_placement import EXPERT_BYTES, MODEL_LAYERS, RANKS_A_NODE, TOKENS
from benchmarks.drawn_routing import EXPERTS, Topics
from longcat_core.parallel.placement import Floats, Placement, place_while_serving, step_rows

STEPS, LAYERS = 1000, 4
CASES = ((8, 32), (32, 32), (128, 32), (128, 128))
"""Ranks and redundant experts. 544 places are no multiple of 128 ranks, which SGLang wants."""


def counts(layer: Topics, window: int, ranks: int) -> Floats:
    steps = layer.steps(window, STEPS, TOKENS * ranks, default_rng(window))
    return step_rows(list(steps), EXPERTS)


def measure(ranks: int, redundant: int) -> Iterator[dict[str, Any]]:
    ours, engines, received = [], [], []
    for seed in range(LAYERS):
        layer = Topics(0.2, default_rng([seed, 1]))
        before, after = (counts(layer, window, ranks) for window in (0, 1))
        current = place_while_serving(before, ranks, redundant, ranks_a_node=RANKS_A_NODE)
        started = time.perf_counter()
        placed = place_while_serving(after, ranks, redundant, ranks_a_node=RANKS_A_NODE, current=current)
        ours.append(time.perf_counter() - started)
        received.append(_received(placed, current, ranks))
        if (EXPERTS + redundant) % ranks == 0:
            engines.append(_sglang(after, ranks, redundant))
    share = -(-MODEL_LAYERS // ranks)
    yield {
        "ranks": ranks,
        "redundant": redundant,
        "policy": "ours",
        "seconds a layer": round(statistics.mean(ours), 3),
        "seconds of the busiest rank": round(max(ours) * share, 2),
        "seconds if each rank placed all": round(statistics.mean(ours) * MODEL_LAYERS, 2),
        "GB received a rank": round(statistics.mean(received) * MODEL_LAYERS * EXPERT_BYTES / ranks / 1e9, 2),
    }
    if engines:
        seconds = statistics.mean(engines) * MODEL_LAYERS
        yield {
            "ranks": ranks,
            "redundant": redundant,
            "policy": "deepseek",
            "seconds a layer": round(statistics.mean(engines), 3),
            "seconds of the busiest rank": round(seconds, 2),
        }


def _received(placed: Any, current: Any, ranks: int) -> int:
    after, before = (Placement(places.reshape(1, ranks, -1)) for places in (placed, current))
    return int(after.received(before)[0])


def _sglang(rows: Floats, ranks: int, redundant: int) -> float:
    """Seconds of a layer; each rank places all of them at once."""
    from sglang.srt.eplb.eplb_algorithms import EplbAlgorithm, rebalance_experts

    slots, given = EXPERTS + redundant, torch.from_numpy(rows).int()[:, None].expand(-1, LAYERS, -1)
    started = time.perf_counter()
    rebalance_experts(given, slots, slots // ranks, None, -(-ranks // RANKS_A_NODE), EplbAlgorithm.deepseek)
    return (time.perf_counter() - started) / LAYERS


def main() -> None:
    if record.ENGINE != "sglang":  # vLLM does not move LongCat's experts
        return
    rows: list[dict[str, Any]] = []
    for ranks, redundant in CASES:
        for row in measure(ranks, redundant):
            rows.append(row)
            print("  ".join(f"{value}" for value in row.values()), flush=True)
    settings = {"tokens a rank": TOKENS, "steps recorded": STEPS, "layers timed": LAYERS}
    print(record.write("rebalancing", rows, **settings, layers=MODEL_LAYERS, ranks_a_node=RANKS_A_NODE))


if __name__ == "__main__":
    typer.run(main)
