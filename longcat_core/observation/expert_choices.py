"""How many FFN experts each token takes, and how evenly: counted on the device, from what the routers have chosen."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def ranks_of_experts(n_routed_experts: int, ranks: int) -> Tensor:
    """int64 [n_routed_experts]: the rank that has each FFN expert, laid out in order, as evenly as can be."""
    parts = torch.arange(n_routed_experts).tensor_split(ranks)
    return torch.cat([torch.full_like(part, rank) for rank, part in enumerate(parts)])


class StepCounts(NamedTuple):
    """What the routers of L layers have chosen in a step."""

    tokens: Tensor
    """int64 [L, K + 1]: tokens by their number of FFN experts."""
    busiest_expert: Tensor
    """int64 [L]: rows of the FFN expert that has most of them."""
    busiest_rank: Tensor | None
    """int64 [L]: rows of FFN experts on the rank that has most of them; None for one rank."""


def count(ids: Tensor, is_real: Tensor, n_routed_experts: int, rank_of_expert: Tensor | None, ranks: int) -> StepCounts:
    """
    ids: int32 [L, T, K], as in `Routing`; is_real: bool [T], false for a row that only pads the step; rank_of_expert:
    as `ranks_of_experts` has it, None for one rank.

    All shapes follow from those of the arguments, so that nothing waits for the device, and a graph can hold it. In a
    small step each operation counts, so there are few.
    """
    layers, tokens, top_k = ids.shape
    real = is_real.long()
    taken = ids.long().add_(1).mul_(real.unsqueeze(-1)).flatten(1)  # an expert's number from 1; 0 for what is none
    rows = taken.new_zeros(layers, n_routed_experts + 1).scatter_(1, taken, 1, reduce="add")[:, 1:]
    numbers = (ids >= 0).sum(dim=-1)
    by_number = taken.new_zeros(layers, top_k + 1).scatter_add_(1, numbers, real.expand(layers, tokens))
    if rank_of_expert is None:
        return StepCounts(by_number, rows.amax(dim=-1), None)
    of_ranks = rows.new_zeros(layers, ranks).index_add_(1, rank_of_expert, rows)
    return StepCounts(by_number, rows.amax(dim=-1), of_ranks.amax(dim=-1))


@dataclass(frozen=True)
class LayerTotals:
    """`StepCounts` of a layer, summed over steps."""

    tokens: tuple[int, ...]
    """By their number of FFN experts, 0 to K."""
    busiest_expert: int
    """Rows of the FFN expert that had most of them in its step."""
    busiest_rank: int | None
    """The same of a rank; None for one rank."""

    @property
    def ffn_choices(self) -> int:
        """Expert choices that were FFN experts: a row of a matrix product each."""
        return sum(number * tokens for number, tokens in enumerate(self.tokens))

    @property
    def zero_choices(self) -> int:
        """Those that were zero experts, and so free."""
        return (len(self.tokens) - 1) * sum(self.tokens) - self.ffn_choices


class ExpertChoices:
    """The sums of all steps of a process, for some layers of a model. Not a module, as they are no weights."""

    def __init__(self, layers: range, top_k: int, n_routed_experts: int, ranks: int, device: torch.device) -> None:
        """layers: by their number in the whole model; ranks: on which the FFN experts are spread."""
        self.layers, self.top_k, self.n_routed_experts, self.ranks = layers, top_k, n_routed_experts, ranks
        self._rank_of_expert = ranks_of_experts(n_routed_experts, ranks).to(device) if ranks > 1 else None
        sizes = [[len(layers), top_k + 1], [len(layers)], [len(layers)]]
        self._sums = [torch.zeros(size, dtype=torch.int64, device=device) for size in sizes[: 3 if ranks > 1 else 2]]

    def add(self, ids: Tensor, is_real: Tensor) -> None:
        """A step's, see `count`; in place, so that a captured graph adds whenever it is replayed."""
        step = count(ids, is_real, self.n_routed_experts, self._rank_of_expert, self.ranks)
        for total, counted in zip(self._sums, step, strict=False):
            total += counted

    def totals(self) -> list[LayerTotals]:
        """By layer. Waits for the device, so not to be called by what makes the steps."""
        tokens, busiest_expert, *ranks = (total.tolist() for total in self._sums)
        busiest_rank = ranks[0] if ranks else [None] * len(self.layers)
        of_layers = zip(map(tuple, tokens), busiest_expert, busiest_rank, strict=True)
        return [LayerTotals(*of_layer) for of_layer in of_layers]
