"""Files that say where experts are, in the form that SGLang reads, and the expert choices of tokens by these places."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor

PLACES, COUNTS = "physical_to_logical_map", "logical_count"
"""What a file can have: the FFN expert in each place, or how often each was chosen (`longcat inspect --record`)."""


def read(given: str, *wanted: str) -> Mapping[str, Any]:
    """What a file says of where experts are, or of how often they were chosen.

    given: a file, .json or .pt, or JSON itself, as SGLang's --init-expert-location takes it; wanted: `PLACES` or
    `COUNTS`, either if nothing is said.

    Raises:
        ValueError: if it cannot be read, or has nothing that is wanted.
    """
    wanted = wanted or (PLACES, COUNTS)
    try:
        if given.endswith(".pt"):
            found = torch.load(given, weights_only=True, map_location="cpu")
        else:
            found = json.loads(Path(given).read_text() if given.endswith(".json") else given)
    except (OSError, EOFError, ValueError, RuntimeError, UnpicklingError) as error:
        raise ValueError(f"{given}: {error}; wanted a file .json or .pt, or JSON") from None
    if not isinstance(found, Mapping) or found.keys().isdisjoint(wanted):
        raise ValueError(f"{given}: wanted {' or '.join(wanted)} in it")
    if PLACES in found and len(found) > 1:  # SGLang would fail over them
        raise ValueError(f"{given}: {', '.join(sorted(found))} in it, wanted nothing beside {PLACES}")
    return found


def places_of(found: Mapping[str, Any], layers: int, experts: int) -> Tensor:
    """The FFN expert in each place, int64 [layers, places]; rank r of R has the r-th of R equal parts of the places.

    Raises:
        ValueError: if it is not for a model with so many layers and FFN experts, or has no place for one of them.
    """
    places = _tensor(found, PLACES)
    if places.dim() != 2 or places.is_floating_point() or len(places) != layers:
        raise ValueError(f"{PLACES}: a {places.dtype} of {list(places.shape)}, wanted integers of [{layers}, places]")
    for number, layer in enumerate(places.tolist()):
        if strange := sorted(set(layer) - set(range(experts))):  # -1 too, which an engine would take for the last
            raise ValueError(f"{PLACES}: expert {strange[0]} in layer {number}, wanted 0 to {experts - 1}")
        if absent := sorted(set(range(experts)) - set(layer)):
            raise ValueError(f"{PLACES}: no place for expert {absent[0]} in layer {number}, wanted one for each")
    return places.long()


def counts_of(found: Mapping[str, Any], sizes: tuple[int, int] | None = None) -> Tensor:
    """How often each FFN expert was chosen in each of some steps, or in all: fp64 [steps, layers, experts].

    sizes: layers and FFN experts of the model, if it is known.

    Raises:
        ValueError: if it is something else.
    """
    counts = _tensor(found, COUNTS)
    wanted = sizes or counts.shape[-2:]
    if counts.dim() not in (2, 3) or counts.shape[-2:] != wanted or bool((counts < 0).any()):
        of_which = f"[{', '.join(map(str, wanted))}]" if sizes else "[layers, experts]"
        raise ValueError(f"{COUNTS}: {list(counts.shape)} numbers, wanted {of_which}, none below 0")
    return counts.double().reshape(-1, *counts.shape[-2:])


def _tensor(found: Mapping[str, Any], name: str) -> Tensor:
    try:
        return torch.as_tensor(found[name])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}; wanted a list of layers, each a list of numbers") from None


class Replicas(NamedTuple):
    """Where a layer's FFN experts are."""

    places: Tensor
    """int64 [experts, most places of one]: those of each expert, its first again where it has fewer."""
    counts: Tensor
    """int64 [experts]: how many places each has."""


def replicas_of(places: Sequence[Sequence[int]]) -> Replicas:
    """places: of each FFN expert of a layer, at least one."""
    most = max(map(len, places))
    padded = [[*each, *[each[0]] * (most - len(each))] for each in places]
    return Replicas(torch.tensor(padded), torch.tensor([len(each) for each in places]))


def place_ids(ids: Tensor, replicas: Replicas) -> Tensor:
    """The place of each expert chosen, of a zero expert -1: [T, K] -> [T, K], in the dtype of the ids.

    The replicas of an expert take turns by the row of the token, so that ranks that compute the same tokens agree.
    """
    experts = ids.clamp(min=0).long()
    turns = torch.arange(len(ids), device=ids.device).unsqueeze(-1) % replicas.counts[experts]
    placed = replicas.places[experts, turns].to(ids.dtype)
    return torch.where(ids >= 0, placed, -1)
