"""Nano's gate: trained on the train part, measured on the held-out one, and noted in the record."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner, Result

from examples.nano import gate
from examples.nano.corpus import standard_library
from longcat_cli import example_tokenizer
from longcat_core.drafting import gate as drafting
from tests.cases import DEFAULT, drafting_tensors, write_checkpoint

HELD_OUT = 0.3


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("library")
    for package in ("json", "email"):
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / package, root / package)
    return root


def test_prompts_are_single_lines_that_open_something(library: Path) -> None:
    corpus = standard_library(HELD_OUT, library)
    found = list(gate.prompts(corpus.train))
    assert 80 < len(found) <= 160
    assert all("\n" not in prompt for prompt in found)
    chats = [prompt for prompt in found if prompt.startswith("[Round 0] USER:")]
    assert len(chats) > 20
    assert all(prompt.endswith(" ASSISTANT:") for prompt in chats)
    lines = {line for text in corpus.train.values() for line in text.split("\n")}
    assert {prompt for prompt in found if prompt not in chats} <= lines


def run(*arguments: str | Path) -> Result:
    app = Typer()
    app.command()(gate.command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_gate_is_written_and_measured_on_held_out_files(library: Path, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", DEFAULT, drafting_tensors(DEFAULT))
    example_tokenizer.write(directory, DEFAULT.vocab_size, DEFAULT.max_position_embeddings)
    record = {"settings": {"held_out": HELD_OUT}, "results": {"bits_per_byte": 1.0}}
    before = record | {"results": record["results"] | {"gate": "the one before"}}
    (directory / "record.json").write_text(json.dumps(before))
    refused = run(directory, "--library", library, "--new-tokens", "3")
    assert (refused.exit_code, "within 3 tokens; raise --new-tokens" in refused.stderr) == (1, True)
    assert json.loads((directory / "record.json").read_text()) == before
    result = run(directory, "--library", library, "--new-tokens", "12")
    assert result.exit_code == 0, result.output
    made = json.loads((directory / "record.json").read_text())
    found = made["results"].pop("gate")
    assert made == record
    trained = drafting.load(directory)
    assert trained is not None
    assert found["threshold"] == trained.threshold
    assert 0 <= found["verified"] <= found["verified_without"] == found["depth"] == 3
    assert 1 <= found["accepted_length"] <= found["accepted_length_without"] <= 4
    pruned = 1 - found["verified"] / 3
    assert f"on held-out files, 3 drafts: {pruned:.1%} pruned" in result.stdout


def test_a_directory_or_a_library_that_is_none_is_refused(library: Path, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps({"settings": {"held_out": HELD_OUT}, "results": {}}))
    for arguments, complaint in [
        ((tmp_path / "absent",), "record.json: no such file; give a directory that examples.nano.train has written"),
        ((tmp_path, "--library", tmp_path / "absent"), "0 files to train on"),
        ((tmp_path, "--library", library), "config.json: no such file"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("examples.nano.gate: ")
        assert complaint in result.stderr
