"""The tokenizer of the tool-calling Nano: the shipped one with the tags of Thinking-2601, and every digit a token."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from longcat_core.chat.templates import THINKING_2601


def ids(tokenizer: Tokenizer) -> list[int]:
    """Of the tags of Thinking-2601, some of which the shipped tokenizer has, and its text has not."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[tag] for tag in THINKING_2601.markers]


def write(base: Path, directory: Path) -> Tokenizer:
    """Write the three files of a tokenizer, made from those of the checkpoint in `base`.

    With digits apart, a number is the same tokens wherever it stands, so that to repeat it is to repeat tokens. Ids of
    the old tokens are kept; the tags that are new come behind them.
    """
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in THINKING_2601.markers])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = json.loads((base / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(THINKING_2601.text)
    return tokenizer
