"""Whether the MTP layer's embedding is the trunk's is said once, whatever the order and the dtype they come in."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longcat_core.weights import audit
from tests.cases import DEFAULT, published

CONFIG = replace(DEFAULT, vocab_size=5000, num_layers=1)
TRUNK, MTP = "model.embed_tokens.weight", "model.mtp.embed_tokens.weight"


@pytest.fixture
def same() -> dict[str, Tensor]:
    tensors = published(CONFIG)
    return {**tensors, TRUNK: tensors[TRUNK].bfloat16(), MTP: tensors[TRUNK].bfloat16().float()}


def load(tensors: dict[str, Tensor], order: int = 1) -> set[str]:
    """As a drafter does; each tensor's memory is used again as soon as the next is asked for."""

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name in list(tensors)[::order]:
            lent = tensors[name].clone()
            yield name, lent
            lent.zero_()

    return {name for name, _ in audit.audited_mtp(stream(), CONFIG, is_partial=False)}


@pytest.mark.parametrize("order", [1, -1])
def test_nothing_is_said_of_the_same_numbers(
    order: int, same: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    assert MTP in load(same, order)
    assert caplog.text == ""


@pytest.mark.parametrize("row", [0, 4999])
@pytest.mark.parametrize("order", [1, -1])
def test_one_other_number_is_said_once(
    order: int, row: int, same: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    same[MTP][row, 7] += 1
    assert TRUNK not in load(same, order)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{MTP} differs from {TRUNK}")


def test_of_several_ranks_the_first_says_it(
    same: dict[str, Tensor], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    same[MTP] += 1
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        load(same)
    assert len(caplog.records) == 1


def test_an_update_without_the_trunks_embedding_is_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    weights = [(MTP, torch.zeros(CONFIG.vocab_size, CONFIG.hidden_size))]
    assert dict(audit.audited_mtp(weights, CONFIG, is_partial=True)).keys() == {MTP}
    assert caplog.text == ""
