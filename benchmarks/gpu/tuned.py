"""The fastest tiles of a measurement, as data for `longcat_core/kernels/tiles.py`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.measured import Measured
from longcat_core.kernels.tiles import DEFAULT, TILES, Tile, tile_for


@dataclass(frozen=True)
class Best:
    precision: str
    slots: int
    """An expert, as the table is asked."""
    tile: dict[str, Any]
    us: float
    default_us: float | None
    """Of the tile that is taken without tuning; None if it was not measured."""


def best_tiles(measured: Measured) -> list[Best]:
    """The fastest for each precision and number of slots, ascending."""
    times: dict[tuple[str, int], list[tuple[float, dict[str, Any]]]] = {}
    for row in measured.rows("tiles"):
        if "result" in row:
            where = (row["case"]["precision"], row["case"]["slots_per_expert"])
            times.setdefault(where, []).append((row["result"]["us"], row["case"]["tile"]))
    found = []
    for (precision, slots), of_slots in sorted(times.items(), key=lambda item: item[0]):
        us, tile = min(of_slots, key=lambda timed: timed[0])
        default = tile_for(DEFAULT, precision, slots)
        default_us = next((us for us, other in of_slots if Tile(**other) == default), None)
        found.append(Best(precision, slots, tile, us, default_us))
    return found


def fragment(device: str, best: list[Best]) -> str:
    """An entry of `TILES`: up to each measured number of slots the tile that was fastest there, and beyond the last one
    its tile. A precision that was not measured is as it is without tuning."""
    lines = [f'    "{device}": {{']
    for precision, default in TILES[DEFAULT].items():
        of_precision = [(found.slots, Tile(**found.tile)) for found in best if found.precision == precision]
        lines.append(f'        "{precision}": (')
        lines += [f"            ({limit}, {tile})," for limit, tile in _merged(of_precision or list(default))]
        lines.append("        ),")
    return "\n".join([*lines, "    },"]) + "\n"


def _merged(tiles: list[tuple[int, Tile]]) -> list[tuple[str, Tile]]:
    """One entry for equal neighbours, each with its limit; the last one has none, which is written as 1 << 30."""
    ends = [i for i in range(len(tiles)) if i + 1 == len(tiles) or tiles[i + 1][1] != tiles[i][1]]
    return [(str(tiles[i][0]) if i + 1 < len(tiles) else "1 << 30", tiles[i][1]) for i in ends]
