"""Checks for commands that run the reference: the checkpoint's tokenizer, and memory for its weights."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from longcat_core.config import LongcatConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class LoadingError(ValueError):
    """A checkpoint or a text that cannot be taken; the message says what is wanted."""


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark; its lines end as they do in the file.

    Raises:
        OSError: if the file cannot be read.
        LoadingError: if it is not UTF-8.
    """
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LoadingError(f"{file}: not UTF-8 ({error}); save it as UTF-8") from None


def read_tokenizer(directory: Path) -> Tokenizer:
    """The checkpoint's `tokenizer.json`.

    Raises:
        LoadingError: if it is missing or no tokenizer.
    """
    from tokenizers import Tokenizer

    source = directory / "tokenizer.json"
    if not source.exists():
        raise LoadingError(f"{source}: no such file; copy the tokenizer that belongs to the checkpoint there")
    try:
        return Tokenizer.from_file(str(source))
    except Exception as error:  # tokenizers raises nothing narrower
        raise LoadingError(f"{source}: not a tokenizer ({error}); download it again") from None


def require_in_vocabulary(tokens: list[int], directory: Path, config: LongcatConfig, what: str) -> None:
    """Raise LoadingError if the tokens, of `what`, are not all the model's."""
    if tokens and max(tokens) >= config.vocab_size:
        raise LoadingError(
            f"{directory / 'tokenizer.json'}: token {max(tokens)} in {what}, wanted below the vocabulary of "
            f"{config.vocab_size}; take the tokenizer that belongs to the checkpoint"
        )


def require_memory(directory: Path, config: LongcatConfig) -> None:
    """Raise LoadingError if this machine has too little memory for the reference: the model in fp32 and, while it
    loads, the checkpoint's tensors as well."""
    weights, memory = (4 + 2) * config.total_parameters, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if weights > memory:
        raise LoadingError(
            f"{directory}: {weights / 1e9:,.0f} GB to load it in float32, and this machine has {memory / 1e9:,.0f} GB "
            "of memory; take a machine that can hold the model"
        )
