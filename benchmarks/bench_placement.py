"""Placement of experts, simulated: the busiest rank's rows over the mean, step by step, and what rebalancing moves.

Experts are placed by the steps that were recorded in a window of time, and serve in the next: once as a server starts,
then by rebalancing twice, a window later each. The policies see the same steps: experts in order (linear), the engine's
own, and longcat_core's (ours; and ours, 1/16, with at most a sixteenth of the experts received by a layer). The replica
of a row is chosen as vLLM does, by a hash of the token's number. An engine's policy needs a multiple of the ranks, so
where that is none it has more redundant experts.

Two bounds:
- "chance": all ranks alike, so that only chance makes one busier. A placement cannot be expected to do better in steps
  that it does not know.
- "hindsight": no placement, even one made for that step alone, has less: an expert's rows have to be on as many ranks
  as it has replicas.
Counted, not timed, but for the time that a policy takes.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
import typer
from numpy.random import default_rng

from benchmarks import record
from benchmarks.drawn_routing import EXPERTS, Routing, Topics, Zipf, read_nano
from longcat_core.layers.routing import relative_load
from longcat_core.parallel.placement import Floats, Ints, Placement, linear, place, step_rows

TOKENS = 96
"""A rank and step: the decode batch of the LongCat-Flash report, 96 requests a GPU."""
LAYERS, WINDOWS, RECORDED, SERVED = 2, 4, 64, 32
RANKS_A_NODE = 8
EXPERT_BYTES, MODEL_LAYERS = 3 * 6144 * 2048, 28
"""Of LongCat-Flash-Chat in FP8."""
CHAT_CASES = [(8, 0), (8, 32), (8, 64), (32, 0), (32, 32), (32, 64), (128, 0), (128, 32), (128, 128)]
CHAT_CASES += [(320, 0), (320, 64), (320, 128)]
NANO_CASES = [(8, 0), (8, 8), (16, 0), (16, 16)]
"""Ranks and redundant experts."""

Policy = Callable[[Floats, int, int, Placement | None], Placement]
"""(rows [steps, 1, experts], ranks, redundant experts, current) -> a placement of one layer."""
Rows = tuple[Ints, Ints]
"""Of a step: the token's hash and the FFN expert of each."""


ENGINES = ("vLLM", "SGLang", "SGLang vec")
"""Policies that want a multiple of the ranks."""


def policies() -> dict[str, Policy]:
    """By name; an engine's where it is installed."""
    found: dict[str, Policy] = {"linear": lambda rows, ranks, redundant, _: linear(1, rows.shape[-1], ranks, redundant)}
    if find_spec("vllm"):
        found["vLLM"] = _vllm
    if find_spec("sglang"):
        found["SGLang"], found["SGLang vec"] = _sglang("deepseek"), _sglang("deepseek_vec")
    found["ours"] = _ours(None)
    found["ours, 1/16"] = _ours(16)
    return found


def _ours(share: int | None) -> Policy:
    def policy(rows: Floats, ranks: int, redundant: int, current: Placement | None) -> Placement:
        a_node = RANKS_A_NODE if ranks % RANKS_A_NODE == 0 else None
        most = None if share is None else rows.shape[-1] // share
        return place(rows, ranks, redundant, ranks_a_node=a_node, current=current, most_received=most)

    return policy


def _vllm(rows: Floats, ranks: int, redundant: int, current: Placement | None) -> Placement:
    from vllm.distributed.eplb.policy import DefaultEplbPolicy

    weight = torch.from_numpy(rows.sum(axis=0))
    before = None if current is None else torch.from_numpy(current.physical_to_logical)
    found = DefaultEplbPolicy.rebalance_experts(
        weight, rows.shape[-1] + redundant, 1, -(-ranks // RANKS_A_NODE), ranks, before
    )
    return Placement(found.numpy().reshape(1, ranks, -1))


def _sglang(algorithm: str) -> Policy:
    def policy(rows: Floats, ranks: int, redundant: int, current: Placement | None) -> Placement:
        from sglang.srt.eplb.eplb_algorithms import EplbAlgorithm, rebalance_experts

        slots = rows.shape[-1] + redundant
        found, _, _ = rebalance_experts(
            torch.from_numpy(rows).float(),
            slots,
            slots // ranks,
            None,
            -(-ranks // RANKS_A_NODE),
            EplbAlgorithm[algorithm],
        )
        return Placement(found.numpy().astype(int).reshape(1, ranks, -1))

    return policy


def of_step(ids: Ints) -> Rows:
    """ids [tokens, K] -> of each row of an FFN expert, the hash of its token, as vLLM's `base_router.py` has it."""
    tokens, columns = np.nonzero(ids >= 0)
    return (tokens * 2654435769) & 0xFFFFFFFF, ids[tokens, columns]


def busiest(placement: Placement, steps: Sequence[Rows], experts: int) -> list[float]:
    """The busiest rank's rows over the mean in each step, for a placement of one layer."""
    _, ranks, slots = placement.experts.shape
    replicas = placement.replicas(experts)[0]
    order = np.argsort(placement.physical_to_logical[0], kind="stable")[-replicas.sum() :] // slots
    first = replicas.cumsum() - replicas
    loads = (np.bincount(order[first[chosen] + hashes % replicas[chosen]], minlength=ranks) for hashes, chosen in steps)
    return [float(relative_load(torch.from_numpy(load)).max()) for load in loads]


def by_chance(steps: Sequence[Rows], ranks: int, seed: int) -> list[float]:
    generator = default_rng(seed)
    loads = (generator.multinomial(len(chosen), np.full(ranks, 1 / ranks)) for _, chosen in steps)
    return [float(relative_load(torch.from_numpy(load)).max()) for load in loads]


def in_hindsight(rows: Floats, ranks: int, redundant: int) -> float:
    """rows [experts] of a step: the least that the busiest rank can have, over the mean."""
    mean = rows.sum() / ranks
    below, above = mean, max(mean, float(rows.max()))
    while above - below > 1e-3 * mean:
        middle = (below + above) / 2
        if np.maximum(np.ceil(rows / middle) - 1, 0).sum() > redundant:
            below = middle
        else:
            above = middle
    return above / mean


class Drawn(NamedTuple):
    """Of one layer, by window."""

    experts: int
    recorded: list[Floats]
    served: list[list[Rows]]


def draw(layer: Routing, ranks: int, seed: int) -> Drawn:
    generator = default_rng(seed)
    tokens = TOKENS * ranks
    recorded = [
        step_rows(list(layer.steps(window, RECORDED, tokens, generator)), layer.experts)
        for window in range(WINDOWS - 1)
    ]
    served = [[of_step(ids) for ids in layer.steps(window, SERVED, tokens, generator)] for window in range(1, WINDOWS)]
    return Drawn(layer.experts, recorded, served)


def measure(name: str, layers: Sequence[Routing], ranks: int, cases: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each number of redundant experts and policy or bound."""
    drawn = [draw(layer, ranks, seed) for seed, layer in enumerate(layers)]
    experts = drawn[0].experts
    steps = [step for layer in drawn for window in layer.served for step in window]
    rows = [np.bincount(chosen, minlength=experts).astype(float) for _, chosen in steps]
    for redundant in cases:
        for policy_name, policy in policies().items():
            used = redundant + (-(experts + redundant) % ranks if policy_name in ENGINES else 0)
            found, costs = serve(policy, drawn, ranks, used)
            yield {
                **_row(name, ranks, redundant, policy_name, found),
                "redundant experts it has": used,
                **costs,
            }
        yield _row(name, ranks, redundant, "chance", by_chance(steps, ranks, 0))
        yield _row(name, ranks, redundant, "hindsight", [in_hindsight(each, ranks, redundant) for each in rows])


def serve(policy: Policy, drawn: Sequence[Drawn], ranks: int, redundant: int) -> tuple[list[float], dict[str, float]]:
    """The busiest rank over the mean of every step served, and what the policy takes."""
    found, received, seconds = [], [], []
    for experts, recorded, served in drawn:
        current = None
        for rows, steps in zip(recorded, served, strict=True):
            started = time.perf_counter()
            placement = policy(rows[:, None], ranks, redundant, current)
            seconds.append(time.perf_counter() - started)
            if current is not None:
                received.append(int(placement.received(current)[0]))
            found += busiest(placement, steps, experts)
            current = placement
    moved = statistics.mean(received)
    costs = {"experts received a layer": round(moved, 1), "seconds a layer": round(statistics.median(seconds), 4)}
    if drawn[0].experts == EXPERTS:
        costs["GB received a rank"] = round(moved * MODEL_LAYERS * EXPERT_BYTES / ranks / 1e9, 2)
    return found, costs


def _row(name: str, ranks: int, redundant: int, policy: str, found: Sequence[float]) -> dict[str, Any]:
    return {
        "routing": name,
        "ranks": ranks,
        "redundant": redundant,
        "policy": policy,
        "mean": round(statistics.mean(found), 3),
        "p99": round(float(np.quantile(found, 0.99)), 3),
    }


def routings() -> Iterator[tuple[str, Sequence[Routing]]]:
    """By name, two layers of each."""
    for drift in (0.0, 0.1):
        yield f"Zipf, drift {drift}", [Zipf(drift, default_rng([seed, 1])) for seed in range(LAYERS)]
    for drift in (0.0, 0.2):
        yield f"topics, drift {drift}", [Topics(drift, default_rng([seed, 1])) for seed in range(LAYERS)]
    yield "Nano", read_nano(WINDOWS)


def main() -> None:
    rows: list[dict[str, Any]] = []
    for name, layers in routings():
        cases = NANO_CASES if name == "Nano" else CHAT_CASES
        for ranks in dict.fromkeys(ranks for ranks, _ in cases):
            for row in measure(name, layers, ranks, [redundant for each, redundant in cases if each == ranks]):
                rows.append(row)
                print("  ".join(f"{value}" for value in row.values()), flush=True)
    settings = {"tokens a rank": TOKENS, "steps recorded": RECORDED, "steps served": SERVED, "windows": WINDOWS}
    print(record.write("placement", rows, **settings, layers=LAYERS, ranks_a_node=RANKS_A_NODE))


if __name__ == "__main__":
    typer.run(main)
