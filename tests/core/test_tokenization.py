"""A tokenizer that ends every text, and what is left of that."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from longcat_core.tokenization import leave_open

BOS, EOS, WORD = 1, 2, 4
SPECIAL = [("<s>", BOS), ("</s>", EOS)]
END = {"single": "$A </s>", "pair": "$A </s> $B </s>"}
BOTH = {"single": "<s> $A </s>", "pair": "<s> $A </s> $B </s>"}


def tokenizer_with(processor: Any) -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<s>": BOS, "</s>": EOS, "<pad>": 3, "word": WORD}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processor
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def template(**parts: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(**parts, special_tokens=SPECIAL)


@pytest.mark.parametrize(
    ("processor", "before", "after"),
    [
        (template(**END), [WORD, EOS], [WORD]),
        (template(**BOTH), [BOS, WORD, EOS], [BOS, WORD]),
        (processors.Sequence([processors.ByteLevel(), template(**BOTH)]), [BOS, WORD, EOS], [BOS, WORD]),
        (template(single="<s> $A", pair="<s> $A $B"), [BOS, WORD], [BOS, WORD]),
        (processors.ByteLevel(), [WORD], [WORD]),
        (None, [WORD], [WORD]),
    ],
    ids=["end", "both", "sequence", "beginning", "bytes", "none"],
)
def test_the_end_is_taken_out_and_nothing_else(processor: Any, before: list[int], after: list[int]) -> None:
    tokenizer = tokenizer_with(processor)
    assert tokenizer.encode("word") == before
    leave_open(tokenizer)
    assert tokenizer.encode("word") == tokenizer(["word"])["input_ids"][0] == after
    assert tokenizer.encode("word", add_special_tokens=False) == [WORD]
    assert tokenizer.encode("word </s>")[-1] == EOS, "an end that is written out stays"


def test_two_texts_are_still_told_apart() -> None:
    tokenizer = tokenizer_with(template(**BOTH))
    leave_open(tokenizer)
    assert tokenizer.encode("word", "word") == [BOS, WORD, EOS, WORD]


def test_there_may_be_no_tokenizer_or_one_of_another_kind() -> None:
    leave_open(None)
    leave_open(object())
