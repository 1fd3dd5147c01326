"""A checkpoint's tensors read one at a time, and shards written one tensor at a time: memory for one, not for all."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.weights.checkpoint import OpenShard, shards
from longcat_core.weights.names import all_tensors, expert_parts, stacked_experts

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class _Place(NamedTuple):
    shard: Path
    stored: str
    """The name it is stored under."""
    dtype: str
    """As safetensors calls it."""
    expert: int | None = None
    """Of stacked experts, the one to take."""
    half: int | None = None
    """Of an expert's gate above its up projection, the one to take: 0 or 1."""


class PublishedTensors:
    """The published tensors of a checkpoint that `checkpoint.verify` accepts, by name. Only names are held."""

    def __init__(self, directory: Path, config: LongcatConfig) -> None:
        """Read the headers of all shards.

        Raises:
            CheckpointError: if a shard cannot be read.
        """
        expected = all_tensors(config)
        places: dict[str, _Place] = {}
        for shard in shards(directory):
            with OpenShard(shard) as opened:
                for stored in opened.keys():  # noqa: SIM118
                    dtype: str = opened.get_slice(stored).get_dtype()
                    if stacked_experts(stored):
                        parts = expert_parts(stored, config)
                        each = len(parts) // config.n_routed_experts
                        for n, name in enumerate(parts):
                            places[name] = _Place(shard, stored, dtype, n // each, n % each if each == 2 else None)
                    elif stored in expected:
                        places[stored] = _Place(shard, stored, dtype)
        self._places = {name: places[name] for name in expected if name in places}
        self.shapes = {name: expected[name] for name in self._places}
        """In the order of `names.expected_tensors`, whatever the files' order."""

    def dtype(self, name: str) -> torch.dtype | str:
        """A name, where it is not fp32, bf16 or FP8 (e4m3)."""
        found = self._places[name].dtype
        return _DTYPES.get(found, found)

    def read(self, name: str) -> Tensor:
        """One tensor, in the dtype it is stored in. Its file is open no longer than that, so that no more than the
        tensor stays mapped."""
        place = self._places[name]
        with OpenShard(place.shard) as opened:
            if place.expert is None:
                return opened.get_tensor(place.stored)
            expert: Tensor = opened.get_slice(place.stored)[place.expert]
        return expert if place.half is None else expert.chunk(2)[place.half]


class Entry(NamedTuple):
    """A tensor of a file to be."""

    name: str
    dtype: torch.dtype
    """fp32, bf16 or FP8 (e4m3)."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def divided(groups: Iterable[Sequence[Entry]], max_shard_size: int) -> list[list[Entry]]:
    """Entries of shards of at most `max_shard_size` bytes each, in order. A group, as of a weight and its scales, is in
    one shard, also where it is larger alone."""
    found: list[list[Entry]] = []
    size = 0
    for group in groups:
        added = sum(entry.nbytes for entry in group)
        if not found or size + added > max_shard_size:
            found.append([])
            size = 0
        found[-1] += group
        size += added
    return found


def write_shard(path: Path, entries: Sequence[Entry], tensors: Iterable[Mapping[str, Tensor]]) -> None:
    """Write a safetensors file of these entries from `tensors`, which come in any order, some at a time.

    The file appears whole or not at all, and its bytes depend on names and tensors only.

    Raises:
        ValueError: if a tensor is not what its entry says, or they are not all there.
    """
    # The largest numbers first, as safetensors itself has it, so that each tensor is aligned in the file.
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for entry in ordered:
        places[entry.name] = (end, entry)
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.nbytes],
        }
        end += entry.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for some in tensors:
            for name, tensor in some.items():
                begin, entry = places.pop(name)
                if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
                    found = f"{tensor.dtype} {list(tensor.shape)}"
                    raise ValueError(f"{name}: {found}, wanted {entry.dtype} {list(entry.shape)}")
                file.seek(8 + len(encoded) + begin)
                file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        if places:
            raise ValueError(f"{path}: {', '.join(places)} did not come")
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
