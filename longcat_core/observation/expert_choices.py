"""How many FFN experts each token takes, and how evenly: counted on the device, from what the routers have chosen."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def ranks_of_experts(n_routed_experts: int, ranks: int) -> Tensor:
    """int64 [n_routed_experts]: the rank that has each FFN expert, laid out in order, as evenly as can be."""
    parts = torch.arange(n_routed_experts).tensor_split(ranks)
    return torch.cat([torch.full_like(part, rank) for rank, part in enumerate(parts)])


def count(ids: Tensor, is_real: Tensor, n_routed_experts: int, rank_of_expert: Tensor, ranks: int) -> Tensor:
    """What the routers of L layers have chosen for the T tokens of a step.

    ids: int32 [L, T, K], as in `Routing`; is_real: bool [T], false for a row that only pads the step. Returns int64
    [L, K + 3]: tokens by their number of FFN experts, 0 to K; rows of the busiest expert; rows of the busiest rank.
    All shapes follow from those of the arguments, so that nothing waits for the device, and a graph can hold it.
    """
    layers, tokens, top_k = ids.shape
    is_row = (ids >= 0) & is_real.unsqueeze(-1)
    by_number = ids.new_zeros(layers, top_k + 1, dtype=torch.int64)
    by_number.scatter_add_(1, is_row.sum(dim=-1), is_real.long().expand(layers, tokens))
    rows = ids.new_zeros(layers, n_routed_experts, dtype=torch.int64)
    rows.scatter_add_(1, ids.clamp(min=0).flatten(1).long(), is_row.flatten(1).long())
    of_ranks = rows.new_zeros(layers, ranks).index_add_(1, rank_of_expert, rows)
    return torch.cat((by_number, rows.amax(dim=-1, keepdim=True), of_ranks.amax(dim=-1, keepdim=True)), dim=-1)


@dataclass(frozen=True)
class LayerTotals:
    """What `count` has counted of a layer, summed over steps."""

    tokens: tuple[int, ...]
    """By their number of FFN experts, 0 to K."""
    busiest_expert: int
    """Rows of the FFN expert that had most of them in its step."""
    busiest_rank: int
    """The same of a rank."""

    @classmethod
    def read(cls, counted: Sequence[int]) -> LayerTotals:
        """counted: [K + 3], a row of what `count` returns."""
        *tokens, busiest_expert, busiest_rank = counted
        return cls(tuple(tokens), busiest_expert, busiest_rank)

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
        self._rank_of_expert = ranks_of_experts(n_routed_experts, ranks).to(device)
        self._counts = torch.zeros(len(layers), top_k + 3, dtype=torch.int64, device=device)

    def add(self, ids: Tensor, is_real: Tensor) -> None:
        """A step's, see `count`; in place, so that a captured graph adds whenever it is replayed."""
        self._counts += count(ids, is_real, self.n_routed_experts, self._rank_of_expert, self.ranks)

    def totals(self) -> list[LayerTotals]:
        """By layer. Waits for the device, so not to be called by what makes the steps."""
        return [LayerTotals.read(counted) for counted in self._counts.tolist()]
