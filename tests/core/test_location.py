"""Files that say where experts are: what is wrong with one is said, and a zero expert has no place."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_core.layers.experts import grouped_ffn, routed_experts
from longcat_core.parallel.location import COUNTS, PLACES, counts_of, place_ids, places_of, read, replicas_of


def test_a_file_and_json_itself_are_read_alike(tmp_path: Path) -> None:
    content = {PLACES: [[1, 0, 1], [0, 1, 0]]}
    (tmp_path / "places.json").write_text(json.dumps(content))
    torch.save({PLACES: torch.tensor(content[PLACES])}, tmp_path / "places.pt")
    for each in (json.dumps(content), str(tmp_path / "places.json"), str(tmp_path / "places.pt")):
        assert places_of(read(each), 2, 2).tolist() == content[PLACES]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nowhere.json", "No such file"),
        ("nowhere.pt", "No such file"),
        ("{", "wanted a file .json or .pt, or JSON"),
        ("[]", f"wanted {PLACES} or {COUNTS} in it"),
        (f'{{"{PLACES}": [[0, 1]], "{COUNTS}": [[1, 1]]}}', f"wanted nothing beside {PLACES}"),
    ],
)
def test_what_cannot_be_read_is_said(content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(content)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([[0, 1]], r"\[1, 2\], wanted integers of \[2, places\]"),
        ([[0, 1], [0.5, 1]], "torch.float32"),
        ([[0, 1], [0]], "wanted a list of layers, each a list of numbers"),
        ([[0, 1, 2], [0, 1, 1]], "expert 2 in layer 0, wanted 0 to 1"),
        ([[0, 1, 1], [0, 1, -1]], "expert -1 in layer 1, wanted 0 to 1"),
        ([[0, 1], [0, 0]], "no place for expert 1 in layer 1"),
    ],
)
def test_places_that_are_not_of_a_models_experts_are_refused(places: Any, message: str) -> None:
    """An empty place, -1, would be another one of the last expert in SGLang's tables."""
    with pytest.raises(ValueError, match=message):
        places_of({PLACES: places}, 2, 2)


def test_counts_are_of_steps_or_of_all() -> None:
    assert counts_of({COUNTS: [[1, 2, 3]]}, (1, 3)).shape == (1, 1, 3)
    assert counts_of({COUNTS: torch.ones(4, 2, 3, dtype=torch.int32)}).dtype == torch.float64
    for counts in ([[1, 2]], [1, 2, 3], [[1, -1, 3]]):
        with pytest.raises(ValueError, match=r"numbers, wanted \[1, 3\], none below 0"):
            counts_of({COUNTS: counts}, (1, 3))


@st.composite
def placed(draw: st.DrawFn) -> tuple[list[int], int]:
    """The expert in each place, and how many experts there are."""
    experts = draw(st.integers(1, 6))
    more = draw(st.lists(st.integers(0, experts - 1), max_size=5))
    return draw(st.permutations([*range(experts), *more])), experts


@settings(max_examples=50, deadline=None)
@given(placed(), st.integers(0, 2**31))
def test_experts_in_their_places_are_the_experts_and_zero_experts_have_none(
    layer: tuple[list[int], int], seed: int
) -> None:
    (places, experts), generator = layer, torch.Generator().manual_seed(seed)
    replicas = replicas_of([[n for n, held in enumerate(places) if held == expert] for expert in range(experts)])
    ids = torch.randint(-1, experts, (9, 4), generator=generator, dtype=torch.int32)
    found = place_ids(ids, replicas)
    assert found.dtype == torch.int32
    assert torch.equal(found < 0, ids < 0)
    assert torch.equal(torch.tensor([*places, -1], dtype=torch.int32)[found.long()], ids)

    weights = torch.rand(9, 4, generator=generator).masked_fill(ids < 0, 0.0)
    x, w13 = torch.randn(9, 8, generator=generator), torch.randn(experts, 12, 8, generator=generator)
    w2 = torch.randn(experts, 8, 6, generator=generator)
    in_order = routed_experts(x, ids, weights, grouped_ffn(w13, w2))
    torch.testing.assert_close(routed_experts(x, found, weights, grouped_ffn(w13[places], w2[places])), in_order)


def test_replicas_take_turns_by_the_row_of_the_token() -> None:
    """On every rank alike, so that a sum over ranks has each of them once."""
    replicas = replicas_of([[0, 2, 5], [1], [3, 4]])
    ids = torch.tensor([[0, 2], [0, 2], [0, 1], [0, 2]])
    assert place_ids(ids, replicas).tolist() == [[0, 3], [2, 4], [5, 1], [0, 4]]
