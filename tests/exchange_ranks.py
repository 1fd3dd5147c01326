"""What each rank of tests/core/test_exchange.py does; a process that imports no engine."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longcat_core.layers.experts import grouped_ffn, routed_experts
from longcat_core.parallel.exchange import AllToAll, Choices, Exchange

HIDDEN, INNER = 16, 8


class Sizes(NamedTuple):
    experts: int
    zero: int
    top_k: int
    tokens: int
    """Of the rank with most: a rank has fewer than the next one, and the first has none."""


MIXED = Sizes(experts=11, zero=5, top_k=5, tokens=9)
NO_EXPERT = Sizes(experts=1, zero=9, top_k=5, tokens=4)
CHAT = Sizes(experts=512, zero=256, top_k=12, tokens=96)


def run(rank: int, ranks: int, port: int, check: Callable[..., None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    check(rank, ranks)
    dist.barrier()
    dist.destroy_process_group()


def routed(sizes: Sizes, rank: int, ranks: int, dtype: torch.dtype = torch.float32) -> Choices:
    """The tokens of a rank, with distinct choices among FFN and zero experts; every rank can draw those of all."""
    generator = torch.Generator().manual_seed(rank)
    tokens = sizes.tokens * rank // max(1, ranks - 1)
    chosen = torch.rand(tokens, sizes.experts + sizes.zero, generator=generator).argsort(dim=1)[:, : sizes.top_k]
    ids = torch.where(chosen < sizes.experts, chosen, -1).int()
    weights = torch.rand(tokens, sizes.top_k, generator=generator).masked_fill(ids < 0, 0.0)
    return Choices(torch.randn(tokens, HIDDEN, generator=generator).to(dtype), ids, weights)


def holders_of(sizes: Sizes, ranks: int) -> Tensor:
    return torch.arange(sizes.experts) * ranks // sizes.experts


def check_sums(rank: int, ranks: int) -> None:
    """In groups of 1, 2, 3 and all ranks, each layer twice."""
    for size in (1, 2, 3, ranks):
        group = dist.new_group(list(range(size)))
        if rank >= size:
            continue
        link = AllToAll(group)
        for sizes in (MIXED, NO_EXPERT, CHAT):
            for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
                exchange = Exchange(link, holders_of(sizes, size))
                given, before = routed(sizes, rank, size, dtype), link.sent_bytes
                ffn = grouped_ffn(*weights_of(sizes, dtype))
                for _ in range(2):
                    dispatch = exchange.dispatch(*given)
                    choices = exchange.received(dispatch)
                    held = exchange.holders[choices.ids.clamp(min=0)] == rank
                    assert bool((held | (choices.ids < 0)).all()), "an expert of another rank"
                    assert bool((choices.ids >= 0).any(dim=1).all()), "a token without work here"
                    sums = exchange.combined(exchange.combine(dispatch, routed_experts(*choices, ffn)))
                    exact = routed_experts(given[0].float(), *given[1:], grouped_ffn(*weights_of(sizes, torch.float32)))
                    assert sums.dtype == dtype
                    assert sums.shape == exact.shape
                    if len(exact):
                        error = float((sums.float() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))
                        assert error < allowed, f"{rank=} {size=} {sizes=} {dtype=}: {error}"
                assert link.sent_bytes - before == 2 * bytes_by_hand(sizes, rank, size, dtype.itemsize)


def weights_of(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(99)
    w13 = torch.randn(sizes.experts, 2 * INNER, HIDDEN, generator=generator) * HIDDEN**-0.5
    return w13.to(dtype), (torch.randn(sizes.experts, HIDDEN, INNER, generator=generator) * INNER**-0.5).to(dtype)


def bytes_by_hand(sizes: Sizes, rank: int, ranks: int, itemsize: int) -> int:
    """Of one layer: a row of hidden state, ids and weights a token and rank, and a sum back for each that came."""
    holder = holders_of(sizes, ranks).tolist()
    sent = back = 0
    for sender in range(ranks):
        for ids in routed(sizes, sender, ranks).ids.tolist():
            goals = {holder[expert] for expert in ids if expert >= 0} - {sender}
            sent += len(goals) if sender == rank else 0
            back += rank in goals
    return sent * (HIDDEN * itemsize + sizes.top_k * 8) + back * HIDDEN * itemsize + 8 * (ranks - 1)


class SlowLink(AllToAll):
    SECONDS = 0.1
    """For what is sent at once; the counts of rows take none."""

    def transfer(self, output: Tensor, rows: Tensor, expected: list[int] | None, counts: list[int] | None) -> None:
        super().transfer(output, rows, expected, counts)
        if counts is not None:
            time.sleep(self.SECONDS)


def check_overlap(rank: int, ranks: int) -> None:
    """Dense work of twice the link's time hides at least 0.8 of it, and none where it comes first or last."""
    assert dist.group.WORLD is not None
    exchange = Exchange(SlowLink(dist.group.WORLD), holders_of(MIXED, ranks))
    matrix = torch.randn(256, 256)
    ffn = grouped_ffn(*weights_of(MIXED, torch.float32))

    def dense() -> None:
        end = time.perf_counter() + 2 * SlowLink.SECONDS
        while time.perf_counter() < end:
            torch.mm(matrix, matrix)

    def waited(in_between: Callable[[], None]) -> float:
        """Seconds of a layer in which nothing is computed."""
        given = routed(MIXED, rank, ranks)
        dist.barrier()
        dispatch = exchange.dispatch(*given)
        in_between()
        started = time.perf_counter()
        choices = exchange.received(dispatch)
        seconds = time.perf_counter() - started
        combine = exchange.combine(dispatch, routed_experts(*choices, ffn))
        in_between()
        started = time.perf_counter()
        exchange.combined(combine)
        return seconds + time.perf_counter() - started

    waited(dense)
    in_a_row = sum(waited(lambda: None) for _ in range(3))
    beside = sum(waited(dense) for _ in range(3))
    assert in_a_row > 3 * 2 * 0.9 * SlowLink.SECONDS
    assert beside < 0.2 * in_a_row, f"{beside:.3f} s of {in_a_row:.3f} s are waited for"


def check_lost_rank(rank: int, ranks: int) -> None:
    """A rank that ends has the others' next step fail."""
    assert dist.group.WORLD is not None
    exchange = Exchange(AllToAll(dist.group.WORLD), holders_of(MIXED, ranks))
    if rank == ranks - 1:
        raise SystemExit(0)
    try:
        exchange.received(exchange.dispatch(*routed(MIXED, rank, ranks)))
    except RuntimeError:
        raise SystemExit(0) from None
    raise AssertionError("nobody missed the last rank")
