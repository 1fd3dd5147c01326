"""`longcat place`: from how often experts were chosen to the file that engines read."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from longcat_cli.commands import app
from longcat_core.parallel.location import COUNTS, PLACES, places_of, read

COUNTED = [[90.0, 80.0, 1, 1, 1, 1, 1, 1], [1.0, 1, 1, 1, 1, 1, 80, 90]]


def run(counts: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["place", str(counts), str(counts.with_name("places.json")), *options])


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({COUNTS: COUNTED}))
    return file


def test_busy_experts_are_apart_and_it_is_said_how_much_that_is(counts: Path) -> None:
    result = run(counts, "--ranks", "2")
    assert result.exit_code == 0, result.stderr
    layers = places_of(read(str(counts.with_name("places.json"))), 2, 8).tolist()
    assert [(0 in layers[0][:4]), (6 in layers[1][:4])] == [(1 in layers[0][4:]), (7 in layers[1][4:])]
    # 90 + 3 of 176 rows are 1.06 times half of them; in their order 172 are 1.95 times.
    assert "8 places of 8 experts on 2 ranks. The busiest rank has 1.06 times the mean, 1.95 with" in result.stdout


def test_redundant_experts_are_the_busiest(counts: Path) -> None:
    assert run(counts, "--ranks", "2", "--redundant", "2").exit_code == 0
    first, second = places_of(read(str(counts.with_name("places.json"))), 2, 8).tolist()
    assert (first.count(0), first.count(1), second.count(6), second.count(7)) == (2, 2, 2, 2)


def test_a_dump_of_sglangs_recorder_is_read(tmp_path: Path) -> None:
    dump = tmp_path / "dump.pt"
    steps = torch.tensor([COUNTED, COUNTED]).int()
    torch.save({"rank": 0, COUNTS: steps, "average_utilization_rate_over_window": None}, dump)
    assert run(dump, "--ranks", "4").exit_code == 0


@pytest.mark.parametrize(
    ("content", "options", "complaint"),
    [
        ({COUNTS: COUNTED}, ["--ranks", "3"], "--ranks: 3, wanted a divisor of the 8 experts and 0 redundant"),
        ({COUNTS: COUNTED}, ["--ranks", "2", "--redundant", "10"], "10 redundant experts, wanted 0 to 8"),
        ({COUNTS: [[0, 0]]}, ["--ranks", "2"], "a layer in which no FFN expert was chosen"),
        ({PLACES: [[0, 1]]}, ["--ranks", "2"], f"wanted {COUNTS} in it"),
    ],
)
def test_what_cannot_be_placed_is_said(content: object, options: list[str], complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    file.write_text(json.dumps(content))
    result = run(file, *options)
    assert result.exit_code == 1
    assert complaint in result.stderr.replace("\n", " ")
    assert not file.with_name("places.json").exists()
