"""Members of the LongCat family are told apart by their fields."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest

from longcat_core.family import Member, member_of
from tests.cases import CHAT

LITE = {**CHAT, "ngram_vocab_size_ratio": 78, "emb_neighbor_num": 4, "emb_split_num": 4}
SPARSE = {**CHAT, "oe_vocab_size_ratio": 78, "index_topk": 2048, "index_n_heads": 16, "model_type": None}


@pytest.mark.parametrize("architecture", ["LongcatFlashForCausalLM", "LongcatCausalLM", None])
@pytest.mark.parametrize("model_type", ["longcat_flash", "longcat", None])
@pytest.mark.parametrize(("fields", "member"), [(CHAT, Member.FLASH), (LITE, Member.NGRAM), (SPARSE, Member.SPARSE)])
def test_a_member_is_known_by_its_fields_under_every_name(
    architecture: str | None, model_type: str | None, fields: dict[str, Any], member: Member
) -> None:
    raw = {**fields, "architectures": architecture and [architecture], "model_type": model_type}
    assert member_of(raw) is member


def test_a_field_that_is_null_is_not_there() -> None:
    assert member_of({**CHAT, "ngram_vocab_size_ratio": None, "index_topk": None}) is Member.FLASH


@pytest.mark.parametrize("architecture", ["LongcatNextForCausalLM", "FLASHLocalForCausalLM", "LlamaForCausalLM"])
def test_an_architecture_that_is_not_known_is_no_member(architecture: str) -> None:
    assert member_of({**CHAT, "architectures": [architecture]}) is Member.OTHER


def test_the_name_of_an_ngram_model_is_believed_without_its_fields() -> None:
    """They may be defaults of its own configuration class."""
    assert member_of({**CHAT, "architectures": ["LongcatFlashNgramForCausalLM"]}) is Member.NGRAM
