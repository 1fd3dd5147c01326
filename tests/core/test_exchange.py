"""The exchange of expert-parallel ranks: the same sums as on one rank, no byte too many, in the dense path's time."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import socket
from collections.abc import Callable
from math import comb

import pytest
import torch.multiprocessing

from tests import exchange_ranks
from tests.exchange_ranks import CHAT, HIDDEN, bytes_by_hand, routed


def on_ranks(ranks: int, check: Callable[[int, int], None]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(exchange_ranks.run, (ranks, port, check), ranks)


def test_each_token_gets_the_sum_over_all_ranks_experts_for_the_bytes_of_its_rows() -> None:
    """1, 2, 3 and 8 ranks, of which the first has no tokens; the bytes are counted by hand."""
    on_ranks(8, exchange_ranks.check_sums)


def test_dense_work_hides_a_slow_link() -> None:
    on_ranks(2, exchange_ranks.check_overlap)


def test_a_rank_that_is_gone_is_an_error_and_no_hang() -> None:
    on_ranks(3, exchange_ranks.check_lost_rank)


def test_eight_ranks_send_two_thirds_of_what_an_all_gather_does() -> None:
    """LongCat-Flash's experts: a rank has 64 of 768, and a token that chooses 12 of them chooses none of a rank's with
    probability 0.35."""
    ranks, row = 8, HIDDEN * 2
    sent = sum(bytes_by_hand(CHAT, rank, ranks, itemsize=2) for rank in range(ranks)) - 8 * ranks * (ranks - 1)
    tokens = sum(len(routed(CHAT, rank, ranks).ids) for rank in range(ranks))
    all_gather = tokens * (ranks - 1) * (row + CHAT.top_k * 8 + row)  # and a reduce-scatter of the sums
    chosen = 1 - comb(768 - 64, 12) / comb(768, 12)
    assert sent / all_gather == pytest.approx(chosen, rel=0.03)
    assert chosen == pytest.approx(0.65, abs=0.01)
