"""Experts that are placed by a file, some of them on both ranks, give the tokens of experts in their order."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch

from longcat_core.parallel.location import PLACES
from tests.cases import CASES, Case
from tests.engines.test_moe import count_rows, ffn_slots
from tests.harness import ENGINE, engine
from tests.oracle import assert_greedy_equal, greedy, oracle, oracle_logits, relative_error

CASE = CASES["default"]
REVERSED = [[7, 6, 5, 4, 3, 2, 1, 0], [0, 2, 4, 6, 1, 3, 5, 7]]
REPLICATED = [[7, 6, 5, 4, 3, 2, 1, 0, 7, 7], [0, 2, 4, 6, 1, 0, 2, 5, 3, 7]]
"""Expert 7 of the first layer is on both ranks, twice on one; experts 0 and 2 of the second are on both."""


def written(places: Sequence[Sequence[int]], directory: Path) -> Path:
    file = directory / "places.json"
    file.write_text(json.dumps({PLACES: places}))
    return file


@pytest.mark.parametrize("places", [REVERSED, REPLICATED], ids=["moved", "replicated"])
def test_placed_experts_are_transformers(
    places: list[list[int]], tmp_path: Path, checkpoint_of: Callable[[Case], Path]
) -> None:
    truth, prompts = oracle(CASE.config, CASE.published()), [CASE.prompts(1, length)[0] for length in (1, 7, 33)]
    with engine.serving(
        checkpoint_of(CASE),
        tensor_parallel=2,
        expert_parallel=True,
        **engine.placed(written(places, tmp_path), len(places[0]) - CASE.config.n_routed_experts),
    ) as served:
        tokens = served.greedy(prompts, 12)
        ours = served.log_softmax(prompts[-1], CASE.config.vocab_size)
    theirs = oracle_logits(truth, torch.tensor([prompts[-1]]))[0, :-1].log_softmax(dim=-1)
    assert relative_error(ours, theirs) < 1e-4
    for prompt, continuation in zip(prompts, tokens, strict=True):
        assert_greedy_equal(continuation, greedy(truth, prompt, 12))


def rows_of_layers(directory: Path, folder: Path, prompt: list[int], change: Callable[..., None]) -> list[int]:
    """Rows that both ranks' kernels are given for a prompt, by layer."""
    rows = folder / "rows"
    with engine.serving(
        directory,
        tensor_parallel=2,
        expert_parallel=True,
        **engine.placed(written(REPLICATED, folder), redundant=2),
        **engine.in_each_rank(partial(change, rows)),
    ) as served:
        rows.write_text("")  # forget what the engine computed to warm up
        served.greedy([prompt], 1)
    counts = [int(count) for count in rows.read_text().split()]
    return [sum(counts[:2]), sum(counts[2:4])]  # ranks wait for each other between layers


def test_a_choice_of_an_ffn_expert_is_one_row_of_one_rank_and_of_a_zero_expert_none(
    tmp_path: Path, checkpoint_of: Callable[[Case], Path]
) -> None:
    directory, prompt = checkpoint_of(CASE), CASE.prompts(1, 50)[0]
    assert rows_of_layers(directory, tmp_path, prompt, count_rows) == ffn_slots(directory, prompt)


def count_rows_with_a_place_for_zero_experts(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = import_module({"sglang": "longcat_sglang.placement", "vllm": "longcat_core.parallel.location"}[ENGINE])
    place_ids = places.place_ids
    monkeypatch.setattr(places, "place_ids", lambda ids, where: place_ids(ids, where).clamp(min=0))
    count_rows(rows, monkeypatch)


def test_a_place_for_zero_experts_would_be_seen(tmp_path: Path, checkpoint_of: Callable[[Case], Path]) -> None:
    directory, prompt = checkpoint_of(CASE), CASE.prompts(1, 50)[0]
    rows = rows_of_layers(directory, tmp_path, prompt, count_rows_with_a_place_for_zero_experts)
    assert rows == [len(prompt) * CASE.config.moe_topk] * CASE.config.num_layers
    assert rows != ffn_slots(directory, prompt)
