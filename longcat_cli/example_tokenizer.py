"""A byte-level BPE tokenizer with LongCat-Flash's special tokens and a chat template, trained on text at hand."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from longcat_core.chat.templates import CHAT, Template

SPECIAL_TOKENS = ("<longcat_unk>", "<longcat_s>", "</longcat_s>", "<longcat_pad>")
"""Left out of decoded text; their ids are their places here."""
MARKERS = CHAT.markers
"""One token each, but kept in decoded text: parsers of tool calls and of reasoning look for them there. Other templates
have others."""
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
"""The fields of `config.json` that name special tokens."""
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS) + len(MARKERS)
"""With Chat's template. Every byte is a token, so that any text can be encoded."""

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What `write` writes."""

_CHARACTERS = 1_000_000


def min_vocab_size(template: Template) -> int:
    """Tokens of the smallest tokenizer that has the markers of `template`."""
    return MIN_VOCAB_SIZE - len(MARKERS) + len(template.markers)


def write(
    directory: Path,
    vocab_size: int,
    model_max_length: int,
    text: Iterable[str] | None = None,
    template: Template = CHAT,
) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.

    The tokenizer has at most `vocab_size` tokens; fewer where the text has no more pairs to merge. It is trained on
    `text`, or on a part of Python's standard library.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(template.markers),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text() if text is None else text, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in template.markers])
    tokenizer.save(str(directory / "tokenizer.json"))

    unknown, bos, eos, pad = SPECIAL_TOKENS
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unknown,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(template.text)


def _text() -> Iterator[str]:
    """Python's standard library: prose and code that every machine with Python has, in the order of file names."""
    left = _CHARACTERS
    # Not those that begin with an underscore: some are written by the build of Python, and differ between machines.
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return
