"""The shipped LongCat-Nano: what it is, and that its record is of it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from examples.nano import measure, training_record
from examples.nano.corpus import encode, standard_library
from longcat_core.drafting import gate as drafting
from longcat_core.reference import LongcatForCausalLM
from longcat_core.weights import checkpoint
from longcat_nano import CHECKPOINT

RECORD = json.loads((Path(training_record.__file__).with_name("record") / training_record.FILE).read_text())
RESULTS = RECORD["results"]


def test_its_directory_is_what_the_command_prints() -> None:
    longcat = Path(sys.executable).with_name("longcat")
    printed = subprocess.run([longcat, "nano"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert Path(printed.strip()).samefile(CHECKPOINT)


def test_it_is_complete_and_at_most_16_mb() -> None:
    config = checkpoint.read_config(CHECKPOINT)
    checkpoint.verify(CHECKPOINT, config, requires_mtp=True)
    assert sum(shard.stat().st_size for shard in checkpoint.shards(CHECKPOINT)) <= 16_000_000


def test_its_record_is_of_these_weights() -> None:
    assert RECORD["sha256"] == training_record.digests(CHECKPOINT)


def test_it_reads_python_that_it_was_not_trained_on() -> None:
    """Some of the held-out files, as this Python has them, in less than gzip takes."""
    held_out = standard_library(RECORD["settings"]["held_out"]).held_out
    texts = [text for name, text in held_out.items() if name in RECORD["corpus"]["held_out_files"]][:10]
    stream = encode(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")), texts)
    model = LongcatForCausalLM.from_checkpoint(CHECKPOINT)
    found = measure.held_out(model, stream, sum(len(text.encode()) for text in texts), sequence_length=256)
    assert found.bits_per_byte < 0.85 * measure.gzip_bits_per_byte(texts)
    assert sum(found.ffn_experts) / len(found.ffn_experts) == pytest.approx(4, rel=0.05)


def test_it_has_learned_more_than_a_bigram_and_gzip() -> None:
    others = (RESULTS["bits_per_byte_of_gzip"], RESULTS["bits_per_byte_of_a_byte_bigram"])
    assert RESULTS["bits_per_byte"] < 0.85 * min(others)


def test_its_router_spends_what_it_was_told_to() -> None:
    target = RECORD["settings"]["zero_experts"]["target"]
    assert RESULTS["ffn_experts_per_token"] == pytest.approx(target, rel=0.03)


def test_its_router_spends_less_on_what_is_easy() -> None:
    """Where a closing bracket or indentation is to come, beside a name or a number, and a keyword beside a name; four
    standard errors apart."""
    classes = {name: each["predicted"] for name, each in RESULTS["classes"].items()}
    pairs = [*itertools.product(("closing bracket", "indentation"), ("name", "number")), ("keyword", "name")]
    for easy, hard in pairs:
        error = (classes[easy]["error"] ** 2 + classes[hard]["error"] ** 2) ** 0.5
        assert classes[hard]["mean"] - classes[easy]["mean"] > 4 * error, (easy, hard)


def test_its_drafts_are_accepted() -> None:
    assert RESULTS["drafts"]["first"] >= 0.6


@torch.no_grad()
def test_it_continues_python() -> None:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    model = LongcatForCausalLM.from_checkpoint(CHECKPOINT)
    prompt = "import os\n\n\nclass Path:\n    def __init__(self, name):\n        self."
    assert tokenizer.decode(model.generate(tokenizer.encode(prompt).ids, 2)).startswith("name")


def test_its_gate_is_its_own() -> None:
    assert drafting.load(CHECKPOINT) is not None


def test_its_gate_gives_up_less_than_2_percent_and_saves_something_for_it() -> None:
    gate = RESULTS["gate"]
    assert gate["accepted_length"] >= 0.98 * gate["accepted_length_without"]
    assert gate["verified"] <= 0.9 * gate["verified_without"] == 0.9 * 3
