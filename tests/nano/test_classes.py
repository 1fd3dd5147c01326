"""Tokens are put into Python's classes, and what is spent on a class is what its tokens took."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from examples.nano.classes import INDENTATION, classify, spent
from longcat_cli import example_tokenizer
from longcat_core.inspection import inspect
from longcat_core.reference import LongcatForCausalLM
from tests.cases import DEFAULT, drafting_tensors, write_checkpoint

TEXT = 'def f(x):\n    return g[x + 12]  # why\n\nname = "a b"\n'


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("classes"), DEFAULT, drafting_tensors(DEFAULT))
    example_tokenizer.write(directory, DEFAULT.vocab_size, DEFAULT.max_position_embeddings)
    return directory


def test_a_token_has_the_class_of_its_first_character() -> None:
    pieces = {
        "def": "keyword",
        " f": "name",
        "(": "operator",
        "x": "name",
        "):": "closing bracket",
        "\n   ": INDENTATION,
        " return": "keyword",
        " g": "name",
        "[": "operator",
        "x ": "name",
        "+": "operator",
        " 12": "number",
        "]": "closing bracket",
        "  ": INDENTATION,
        "# why": "comment",
        "\n\n": INDENTATION,
        "name ": "name",
        "=": "operator",
        ' "a b': "string",
        '"': "string",
    }
    offsets, end = [], 0
    for piece in pieces:
        offsets.append((end, end + len(piece)))
        end += len(piece)
    assert "".join(pieces) + "\n" == TEXT
    assert classify(TEXT, offsets) == list(pieces.values())


@pytest.mark.parametrize("text", ["f(", "  x\n y\n", "'''"])
def test_what_is_not_python_has_no_classes(text: str) -> None:
    assert classify(text, [(0, 1)]) is None


def test_lines_end_where_pythons_tokenizer_ends_them() -> None:
    text = "# a\x0cb\u2028c\nname = 1\n"
    assert classify(text, [(0, 7), (8, 12), (15, 16)]) == ["comment", "name", "number"]


def test_what_is_spent_is_what_the_tokens_of_a_class_took(directory: Path) -> None:
    model = LongcatForCausalLM.from_checkpoint(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    encoding = tokenizer.encode(TEXT)
    classes = classify(TEXT, encoding.offsets)
    assert classes is not None
    found = spent(model, tokenizer, ["f(", TEXT], sequence_length=16)
    experts, nats, drafts = [], [], []
    for start in range(0, len(encoding.ids), 16):
        inspection = inspect(model, encoding.ids[start : start + 16])
        assert inspection.drafts is not None
        experts += inspection.ffn_experts.double().mean(dim=0).tolist()
        nats += inspection.nats.tolist()
        drafts += inspection.drafts.double().tolist()
    for name, each in found.items():
        places = [n for n, kind in enumerate(classes) if kind == name and n % 16 >= 2]
        assert each.tokens == len(places)
        read, before = (torch.tensor([experts[n - shift] for n in places]) for shift in (0, 1))
        assert each.read.mean == pytest.approx(float(read.mean()))
        assert each.read.error == pytest.approx(float(read.std()) / len(places) ** 0.5)
        assert each.predicted.mean == pytest.approx(float(before.mean()))
        assert each.nats == pytest.approx(sum(nats[n] for n in places) / len(places), rel=1e-4)
        assert each.drafts_accepted == pytest.approx(sum(drafts[n] for n in places) / len(places))
    assert [each.read.mean for each in found.values()] == sorted(each.read.mean for each in found.values())
    assert {"name", "operator"} <= found.keys()
