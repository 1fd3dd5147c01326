"""The all-to-all of expert-parallel ranks, beside which the dense path runs: each token once a rank, no zero expert."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longcat_core.layers.experts import combine


class AllToAll:
    """Sends rows to every rank of a group and receives theirs, in a thread of its own.

    What is sent goes out one after the other, so all ranks of a group have to send in the same order. A rank without
    rows takes part too. Nothing else may use the group meanwhile.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent_bytes = 0
        """To other ranks so far, counts of rows included."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="all-to-all")

    def begin(self, rows: Tensor, counts: list[int], expected: list[int] | None = None) -> Future[Received]:
        """rows: [N, ...] in the order of ranks, `counts` for each of them, none for this one, and not written to until
        all are received; expected: how many rows each sends, if that is known.

        The result raises RuntimeError if another rank is gone.
        """
        assert counts[self.rank] == 0, "rows of this rank's own need no link"
        return self._thread.submit(self._exchange, rows, counts, expected)

    def _exchange(self, rows: Tensor, counts: list[int], expected: list[int] | None) -> Received:
        if expected is None:
            each = torch.empty(self.size, dtype=torch.int64)
            self.transfer(each, torch.tensor(counts), None, None)
            expected = each.tolist()
            self.sent_bytes += each.nbytes - each.itemsize
        received = rows.new_empty(sum(expected), *rows.shape[1:])
        self.transfer(received, rows, expected, counts)
        self.sent_bytes += rows.nbytes
        return Received(received, expected)

    def transfer(self, output: Tensor, rows: Tensor, expected: list[int] | None, counts: list[int] | None) -> None:
        """Return when all is received. Without counts each rank gets as many rows as any other."""
        dist.all_to_all_single(output, rows, expected, counts, group=self.group)


class Received(NamedTuple):
    rows: Tensor
    """[N, ...] in the order of the ranks that sent them."""
    counts: list[int]
    """Of each rank."""


class Choices(NamedTuple):
    """Tokens, and what this rank's experts are to do with them."""

    hidden_states: Tensor
    """[N, H]."""
    ids: Tensor
    """int32 [N, K]: experts of this rank, by their numbers among all, or -1."""
    weights: Tensor
    """fp32 [N, K]."""


class Exchange:
    """The exchange of one layer. The three steps follow each other, once each, then the next layer's begin."""

    def __init__(self, link: AllToAll, holders: Tensor) -> None:
        """holders: int64 [E], the rank that has each FFN expert."""
        self.link, self.holders = link, holders

    def dispatch(self, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Dispatch:
        """Begin to send tokens [T, H] to the ranks that have one of their experts, with ids int32 [T, K] and weights
        fp32 [T, K] as in `Routing`. The tokens are copied."""
        rank, num_tokens = self.link.rank, ids.shape[0]
        holders = torch.where(ids >= 0, self.holders[ids.clamp(min=0)], self.link.size)
        wanted = torch.zeros(num_tokens, self.link.size + 1, dtype=torch.bool).scatter_(1, holders, True)[:, :-1]
        own = wanted[:, rank].nonzero().squeeze(1)
        wanted[:, rank] = False
        tokens = wanted.T.nonzero()[:, 1]
        packed = _packed(hidden_states[tokens], ids[tokens], weights[tokens])
        counts = wanted.sum(dim=0).tolist()
        kept = Choices(hidden_states[own], ids[own], weights[own])
        return Dispatch(num_tokens, tokens, own, kept, counts, self.link.begin(packed, counts))

    def received(self, dispatch: Dispatch) -> Choices:
        """Wait for other ranks' tokens: theirs, then this rank's own that it has an expert for.

        Raises:
            RuntimeError: if a rank is gone.
        """
        kept = dispatch.kept
        theirs = _unpacked(dispatch.on_its_way.result().rows, kept)
        choices = Choices(*(torch.cat(pair) for pair in zip(theirs, kept, strict=True)))
        is_here = (choices.ids >= 0) & (self.holders[choices.ids.clamp(min=0)] == self.link.rank)
        return choices._replace(ids=torch.where(is_here, choices.ids, -1))

    def combine(self, dispatch: Dispatch, sums: Tensor) -> Combine:
        """Begin to send the weighted sums of this rank's experts back: [N, H], of the rows of `received`."""
        counts = dispatch.on_its_way.result().counts
        theirs, own = sums.split([sum(counts), len(dispatch.own)])
        return Combine(dispatch, own, self.link.begin(theirs.contiguous(), counts, expected=dispatch.counts))

    def combined(self, sent: Combine) -> Tensor:
        """Wait, and sum what all ranks' experts made of this rank's tokens, in fp32: [T, H] in the sums' dtype.

        Raises:
            RuntimeError: if a rank is gone.
        """
        sums = torch.cat([sent.on_its_way.result().rows, sent.own])
        tokens = torch.cat([sent.dispatch.tokens, sent.dispatch.own])
        if not len(tokens):
            return sums.new_zeros(sent.dispatch.num_tokens, sums.shape[1])
        tokens, order = tokens.sort(stable=True)
        return combine(sums[order], tokens, sent.dispatch.num_tokens)


class Dispatch(NamedTuple):
    """Tokens that are on their way to experts of other ranks."""

    num_tokens: int
    tokens: Tensor
    """int64: of each row that is sent."""
    own: Tensor
    """int64, ascending: those that this rank has an expert for."""
    kept: Choices
    """Of `own`."""
    counts: list[int]
    """Of rows that each rank gets."""
    on_its_way: Future[Received]


class Combine(NamedTuple):
    """Sums of experts that are on their way back."""

    dispatch: Dispatch
    own: Tensor
    """[tokens of this rank's own, H]."""
    on_its_way: Future[Received]


def _packed(hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """One row of bytes a token, so that one message has all of it."""
    return torch.cat([part.contiguous().view(torch.uint8) for part in (hidden_states, ids, weights)], dim=1)


def _unpacked(rows: Tensor, like: Choices) -> Choices:
    parts = rows.split([part.shape[1] * part.itemsize for part in like], dim=1)
    return Choices(*(part.contiguous().view(of.dtype) for part, of in zip(parts, like, strict=True)))
