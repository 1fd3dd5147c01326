"""How much more than the mean the busiest rank has: from random routing, or from counts that were recorded."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path


def random_imbalance(ranks: int, rows_a_rank: float) -> float:
    """Rows of the busiest rank over the mean where each token chooses experts alike and for itself.

    The expected maximum of `ranks` normal deviates is about sqrt(2 ln ranks); a rank's rows have the variance of their
    mean. For 128 ranks and 1536 rows 1.08, for 128 rows 1.28.
    """
    if ranks <= 1 or rows_a_rank <= 0:
        return 1.0
    return 1 + math.sqrt(2 * math.log(ranks) / rows_a_rank)


def recorded_imbalance(counts: Sequence[Sequence[float]], ranks: int, is_balanced: bool = False) -> float:
    """counts [layers, experts]: how often each FFN expert was chosen. The busiest rank over the mean, mean over layers.

    Ranks have neighbouring experts, as engines place them. is_balanced: as after EPLB without redundant experts, by its
    greedy packing: the most used expert goes to the rank with the least so far, as many experts to each.

    Raises:
        ValueError: if the ranks do not divide the experts, or nothing was counted.
    """
    found = []
    for layer in counts:
        each, rest = divmod(len(layer), ranks)
        if rest or not each:
            raise ValueError(f"routing: {len(layer)} experts, which {ranks} ranks do not divide")
        if not sum(layer):
            raise ValueError("routing: a layer in which no expert was chosen")
        loads = (
            _packed(layer, ranks, each)
            if is_balanced
            else [sum(layer[rank * each : (rank + 1) * each]) for rank in range(ranks)]
        )
        found.append(max(loads) * ranks / sum(layer))
    if not found:
        raise ValueError("routing: no layer")
    return sum(found) / len(found)


def _packed(layer: Sequence[float], ranks: int, each: int) -> list[float]:
    loads, experts = [0.0] * ranks, [0] * ranks
    for count in sorted(layer, reverse=True):
        rank = min((r for r in range(ranks) if experts[r] < each), key=loads.__getitem__)
        loads[rank] += count
        experts[rank] += 1
    return loads


def read_counts(path: Path) -> list[list[float]]:
    """A JSON file: a list of layers, each a list of counts by FFN expert.

    Raises:
        ValueError: if it is something else.
    """
    found = json.loads(path.read_text())
    if not isinstance(found, list) or not all(
        isinstance(layer, list) and all(isinstance(n, (int, float)) and n >= 0 for n in layer) for layer in found
    ):
        raise ValueError(f"{path}: wanted a list of layers, each a list of counts by expert")
    return found
