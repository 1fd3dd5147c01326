"""Tiles of the experts' products, as data: for which device, precision and rows an expert which tile is taken."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """What one program of a grouped product computes, and with how many threads."""

    rows: int
    """Of one expert; also the block that rows are arranged in."""
    columns: int
    """Of the output. In FP8 128: the scales of a weight and of the rows for the next product are for so many."""
    depth: int
    """Columns of rows and weights multiplied at a time. In FP8 128."""
    warps: int
    stages: int
    """Depths that are on their way to shared memory at once."""
    is_swapped: bool
    """Whether the weights are on the side of the tensor core's 64 rows, which few rows of an expert do not fill."""


DEFAULT = "any"
TILES: dict[str, dict[str, tuple[tuple[int, Tile], ...]]] = {
    DEFAULT: {
        "16 bit": (
            (16, Tile(rows=16, columns=128, depth=64, warps=4, stages=4, is_swapped=True)),
            (32, Tile(rows=32, columns=128, depth=64, warps=4, stages=4, is_swapped=True)),
            (128, Tile(rows=64, columns=128, depth=64, warps=8, stages=3, is_swapped=False)),
            (1 << 30, Tile(rows=128, columns=128, depth=64, warps=8, stages=3, is_swapped=False)),
        ),
        "fp8": (
            (16, Tile(rows=16, columns=128, depth=128, warps=4, stages=4, is_swapped=True)),
            (32, Tile(rows=32, columns=128, depth=128, warps=8, stages=4, is_swapped=True)),
            (1 << 30, Tile(rows=64, columns=128, depth=128, warps=8, stages=3, is_swapped=False)),
        ),
        "32 bit": (((1 << 30), Tile(rows=16, columns=32, depth=32, warps=4, stages=2, is_swapped=False)),),
    },
}
"""By the device's name, then precision: rows an expert up to which a tile is taken, ascending. Chosen so that the
compiled code uses Hopper's tensor cores without spilling (docs/kernels.md); none was timed. A device that is not here
has the tiles of "any"."""


def tile_for(device: str, precision: str, rows_per_expert: int) -> Tile:
    """The tile for so many rows an expert, on average; device: as `torch.cuda.get_device_name` has it."""
    tiles = TILES.get(device, TILES[DEFAULT])[precision]
    return next(tile for rows, tile in tiles if rows_per_expert <= rows)
