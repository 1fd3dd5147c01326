"""LongCat-Nano's corpus: which files are in it, how it is split, and the batches of a run."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest
import torch

from examples.nano.chats import chat, chats
from examples.nano.corpus import Batches, Corpus, is_held_out, standard_library
from longcat_core.chat.templates import CHAT


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return standard_library(held_out=0.05)


def test_train_and_held_out_files_are_disjoint_and_the_same_every_time(corpus: Corpus) -> None:
    assert not corpus.train.keys() & corpus.held_out.keys()
    assert corpus.digest() == standard_library(held_out=0.05).digest() != standard_library(held_out=0.1).digest()
    assert all(is_held_out(name, 0.05) for name in corpus.held_out)
    assert not any(is_held_out(name, 0.05) for name in corpus.train)


def test_a_file_held_out_stays_so_when_more_are(corpus: Corpus) -> None:
    assert corpus.held_out.keys() < standard_library(held_out=0.1).held_out.keys()


def test_tests_data_and_what_cannot_be_imported_are_left_out(corpus: Corpus) -> None:
    names = corpus.train.keys() | corpus.held_out.keys()
    assert "json/decoder.py" in names
    wrong = ("site-packages/", "test/", "tests/", "encodings/", "config-", "_sysconfigdata__")
    assert [name for name in names if name.startswith(wrong) or "/test/" in name] == []


def test_a_library_without_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="0 files to train on and 0 held out"):
        standard_library(0.05, tmp_path)


def test_a_conversation_is_what_the_chat_template_writes() -> None:
    template = jinja2.Environment().from_string(CHAT.text)
    turns = [{"role": "user", "content": "Add one."}, {"role": "assistant", "content": "def f(): ..."}]
    assert template.render(messages=turns) == chat("Add one.", "def f(): ...") + "</longcat_s>"


def test_functions_with_docstrings_become_conversations() -> None:
    method = '    def one(self):\n        """Give one.\n\n        More."""\n        return 1\n'
    source = f"class A:\n{method}    def two(self): ...\n"
    wanted = chat("Give one.", 'def one(self):\n    """Give one.\n\n    More."""\n    return 1\n')
    assert chats({"a.py": source, "b.py": "not Python"}, share=1.0) == [wanted]
    assert chats({"a.py": source}, share=0.0) == []


def test_an_epoch_sees_every_window_once_and_the_next_one_is_cut_elsewhere() -> None:
    batches = Batches(torch.arange(1000, dtype=torch.int32), batch_size=4, sequence_length=16, seed=3)
    assert batches.steps_per_epoch == 15
    epochs = [torch.cat([batches[15 * e + step] for step in range(15)]) for e in range(2)]
    for windows in epochs:
        starts = windows[:, 0].sort().values
        assert torch.equal(windows - windows[:, :1], torch.arange(16).expand(60, 16))
        assert torch.equal(starts - starts[0], 16 * torch.arange(60))
    assert not torch.equal(*epochs)


def test_a_batch_depends_on_the_seed_and_the_step_alone() -> None:
    stream = torch.arange(1000, dtype=torch.int32)
    one, other = (Batches(stream, batch_size=4, sequence_length=16, seed=3) for _ in range(2))
    wanted = [one[step] for step in range(20)]
    assert all(torch.equal(other[step], wanted[step]) for step in (17, 2, 19))
    assert not torch.equal(Batches(stream, batch_size=4, sequence_length=16, seed=4)[0], wanted[0])


def test_a_stream_shorter_than_a_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="79 tokens, wanted at least 80"):
        Batches(torch.zeros(79, dtype=torch.int32), batch_size=4, sequence_length=16, seed=0)
