"""The text of LongCat-Nano: the Python standard library's sources, split by file, as tokens and as batches."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from examples.nano.chats import chats
from examples.nano.settings import Settings
from longcat_cli import example_tokenizer

_TESTS = {"test", "tests", "idle_test"}
# Tables of characters and a book as one string: neither reads like Python.
_DATA = {"encodings", "pydoc_data"}

END = example_tokenizer.TOKEN_IDS["eos_token_id"]
"""`</longcat_s>`: stands before the first file, and after each."""


class Corpus(NamedTuple):
    """Texts by their path within the library, sorted by it."""

    train: dict[str, str]
    held_out: dict[str, str]

    def digest(self) -> str:
        """sha256 over paths and texts, in hexadecimal: the same corpus or not."""
        found = hashlib.sha256()
        for part in self:
            for name, text in part.items():
                found.update(f"{name}\0{text}\0".encode())
        return found.hexdigest()


def standard_library(held_out: float, root: Path | None = None) -> Corpus:
    """The sources of the interpreter that runs this, or those under `root`.

    Files that cannot be imported by their path (site-packages, what the build of Python wrote for one machine) are left
    out, and so are tests, which not every machine has, and data.
    A file is held out by a hash of its path, so that it is on every machine and in every version of Python.

    Raises:
        FileNotFoundError: if there are no sources, or none in one of the parts.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    corpus = Corpus({}, {})
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).with_suffix("").parts
        if all(part.isidentifier() for part in parts) and not (_TESTS | _DATA).intersection(parts):
            name = "/".join(parts) + ".py"
            text = path.read_text(encoding="utf-8", errors="replace")
            (corpus.held_out if is_held_out(name, held_out) else corpus.train)[name] = text
    if not corpus.train or not corpus.held_out:
        raise FileNotFoundError(
            f"{root}: {len(corpus.train)} files to train on and {len(corpus.held_out)} held out, wanted some of both; "
            "install the sources of Python's standard library"
        )
    return corpus


def is_held_out(name: str, share: float) -> bool:
    """By the path alone, e.g. `json/decoder.py`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < share * 2**64


class Streams(NamedTuple):
    """Both parts of a corpus, int32 [tokens] each; see `encode`."""

    train: Tensor
    held_out: Tensor


def streams(corpus: Corpus, directory: Path, settings: Settings) -> Streams:
    """Train a tokenizer on the train part, write it to `directory`, and encode both parts with it.

    Conversations made of the train part's functions follow its files; the held-out part is files alone.
    """
    model = settings.model
    example_tokenizer.write(directory, model.vocab_size, model.max_position_embeddings, corpus.train.values())
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return Streams(
        encode(tokenizer, [*corpus.train.values(), *chats(corpus.train, settings.chats)]),
        encode(tokenizer, list(corpus.held_out.values())),
    )


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """One stream, int32 [tokens]: `END`, then each text with an `END` after it."""
    stream = [END]
    for encoding in tokenizer.encode_batch(list(texts)):
        stream += [*encoding.ids, END]
    return torch.tensor(stream, dtype=torch.int32)


class Batches:
    """The batch of every step, from the seed and the step alone, so that a run that goes on sees the same ones.

    Each epoch cuts the stream into windows at another place, and takes them in another order.
    """

    def __init__(self, stream: Tensor, batch_size: int, sequence_length: int, seed: int) -> None:
        """stream: int32 [tokens].

        Raises:
            ValueError: if the stream has too few tokens for a batch.
        """
        self._stream, self._length, self._size, self._seed = stream, sequence_length, batch_size, seed
        # One window less than fit, so that the cut can be anywhere.
        self.steps_per_epoch = (len(stream) // sequence_length - 1) // batch_size
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"{len(stream)} tokens, wanted at least {(batch_size + 1) * sequence_length}, a batch and a window: "
                "take smaller batches, or more text"
            )
        self._epoch, self._starts = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, step: int) -> Tensor:
        """int64 [batch, sequence]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
            cut = int(torch.randint(self._length, (), generator=generator))
            windows = self.steps_per_epoch * self._size
            self._starts = cut + self._length * torch.randperm(windows, generator=generator)
            self._epoch = epoch
        starts = self._starts[place * self._size : (place + 1) * self._size]
        return self._stream[starts.unsqueeze(1) + torch.arange(self._length)].long()
