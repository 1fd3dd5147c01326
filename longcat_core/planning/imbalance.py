"""How much more than the mean the busiest rank has: from random routing, or from counts that were recorded."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from longcat_core.parallel.placement import deviations_of_the_busiest, linear, place


def random_imbalance(ranks: int, rows_a_rank: float) -> float:
    """Rows of the busiest rank over the mean where each token chooses experts alike and for itself.

    A rank's rows have the variance of their mean. For 128 ranks and 1536 rows 1.08, for 128 rows 1.28.
    """
    if ranks <= 1 or rows_a_rank <= 0:
        return 1.0
    return 1 + deviations_of_the_busiest(ranks) / math.sqrt(rows_a_rank)


def recorded_imbalance(counts: Sequence[Sequence[float]], ranks: int, is_balanced: bool = False) -> float:
    """counts [layers, experts]: how often each FFN expert was chosen. The busiest rank over the mean, mean over layers.

    Ranks have neighbouring experts, as engines place them, or those that `placement.place` gives them, none redundant.

    Raises:
        ValueError: if the ranks do not divide the experts, or nothing was counted.
    """
    found = []
    for layer in counts:
        if len(layer) % ranks or not layer:
            raise ValueError(f"routing: {len(layer)} experts, which {ranks} ranks do not divide")
        if not sum(layer):
            raise ValueError("routing: a layer in which no expert was chosen")
        rows = np.array([layer], dtype=float)
        placement = place(rows[None], ranks) if is_balanced else linear(1, len(layer), ranks)
        found.append(float(placement.rank_rows(rows).max()) * ranks / sum(layer))
    if not found:
        raise ValueError("routing: no layer")
    return sum(found) / len(found)


def read_counts(path: Path) -> list[list[float]]:
    """A JSON file: a list of layers, each a list of counts by FFN expert; or an object with that as `logical_count`, as
    `longcat inspect --record` writes it, and SGLang's `--init-expert-location` reads it.

    Raises:
        ValueError: if it is something else.
    """
    found = json.loads(path.read_text())
    if isinstance(found, dict):
        found = found.get("logical_count")
    if not isinstance(found, list) or not all(
        isinstance(layer, list) and all(isinstance(n, (int, float)) and n >= 0 for n in layer) for layer in found
    ):
        raise ValueError(f"{path}: wanted a list of layers, each a list of counts by expert")
    return found
