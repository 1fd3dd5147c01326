"""Tells which member of the LongCat family a `config.json` is of: by its fields, as several members share a name."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

ARCHITECTURE = "LongcatFlashForCausalLM"
"""The architecture by which engines know LongCat-Flash."""
ARCHITECTURES = (ARCHITECTURE, "LongcatCausalLM")
"""The architectures with which it is published: LongCat-Flash-Thinking-2601 is reported with the second, which
LongCat-Flash-Lite-Sparse and LongCat-2.0 have too."""

_NGRAM_FIELDS = (
    *("ngram_vocab_size_ratio", "emb_neighbor_num", "emb_split_num"),
    *("oe_vocab_size_ratio", "oe_neighbor_num", "oe_split_num"),
)
_INDEXER_FIELDS = ("index_topk", "index_n_heads")


class Member(Enum):
    FLASH = "LongCat-Flash"
    NGRAM = "LongCat-Flash-Lite, which has n-gram embeddings"
    SPARSE = "LongCat-Flash-Lite-Sparse or LongCat-2.0, which have sparse attention"
    OTHER = "a model that longcat-serving does not know"


def member_of(raw: Mapping[str, Any]) -> Member:
    """raw: a `config.json`, of any model. Its `model_type` says nothing: published files have none, or another
    member's."""
    names = raw.get("architectures") or [ARCHITECTURE]
    name = names[0] if isinstance(names, (list, tuple)) else names
    if name == "LongcatFlashNgramForCausalLM":
        return Member.NGRAM
    if name not in ARCHITECTURES:
        return Member.OTHER
    if any(raw.get(field) is not None for field in _INDEXER_FIELDS):
        return Member.SPARSE
    if any(raw.get(field) is not None for field in _NGRAM_FIELDS):
        return Member.NGRAM
    return Member.FLASH
