"""How many FFN experts each token takes, and how evenly: counted on the device, from what the routers have chosen."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longcat_core.kernels.cpu import choices


def ranks_of_experts(n_routed_experts: int, ranks: int) -> Tensor:
    """int64 [n_routed_experts]: the rank that has each FFN expert, laid out in order, as evenly as can be."""
    parts = torch.arange(n_routed_experts).tensor_split(ranks)
    return torch.cat([torch.full_like(part, rank) for rank, part in enumerate(parts)])


class Sums(NamedTuple):
    """What the routers of L layers have chosen, summed over steps."""

    tokens: Tensor
    """int64 [L, K + 1]: tokens by their number of FFN experts."""
    busiest_expert: Tensor
    """int64 [L]: rows of the FFN expert that had most of them in its step."""
    busiest_rank: Tensor
    """int64 [L]: rows of FFN experts on the rank that had most of them in its step; stays 0 where there is one rank."""


def stacked(ids: Tensor | Sequence[Tensor]) -> Tensor:
    """Of each layer [T, K] -> [layers, T, K], if they are not yet."""
    return ids if isinstance(ids, Tensor) else torch.stack(tuple(ids))


def add_step(
    sums: Sums, ids: Tensor, is_real: Tensor, n_routed_experts: int, rank_of_expert: Tensor, ranks: int
) -> None:
    """Add a step's choices, in place, so that a captured graph adds whenever it is replayed.

    ids: int32 [L, T, K], as in `Routing`; is_real: int64 [T], 1 for a token, 0 for a row that only pads the step;
    rank_of_expert: as `ranks_of_experts` has it. All shapes follow from those of the arguments, so
    that nothing waits for the device. What a small step pays for is the number of operations, so there are few.
    """
    layers, tokens, _ = ids.shape
    is_real_row = is_real.unsqueeze(-1)
    taken = torch.addcmul(is_real_row, ids, is_real_row)  # the number of an FFN expert from 1; 0 for all that is none
    sums.tokens.scatter_add_(1, taken.count_nonzero(dim=-1), is_real.expand(layers, tokens))
    rows = taken.new_zeros(layers, n_routed_experts + 1).scatter_(1, taken.flatten(1), 1, reduce="add")[:, 1:]
    sums.busiest_expert.add_(rows.amax(dim=-1))
    if ranks > 1:
        of_ranks = rows.new_zeros(layers, ranks).index_add_(1, rank_of_expert, rows)
        sums.busiest_rank.add_(of_ranks.amax(dim=-1))


@dataclass(frozen=True)
class LayerTotals:
    """`Sums` of a layer."""

    tokens: tuple[int, ...]
    """By their number of FFN experts, 0 to K."""
    busiest_expert: int
    """Rows of the FFN expert that had most of them in its step."""
    busiest_rank: int
    """The same of a rank; 0 where there is one."""

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

    def __init__(
        self,
        layers: range,
        top_k: int,
        n_routed_experts: int,
        ranks: int,
        device: torch.device,
        first_slot: int,
    ) -> None:
        """layers: by their number in the whole model; ranks: on which the FFN experts are spread; first_slot: the least
        that a token has in the engine's cache."""
        self.layers, self.top_k, self.n_routed_experts, self.ranks = layers, top_k, n_routed_experts, ranks
        self._first_slot = first_slot
        self._rank_of_expert = ranks_of_experts(n_routed_experts, ranks).to(device)
        sizes = ([len(layers), top_k + 1], [len(layers)], [len(layers)])
        self._sums = Sums(*(torch.zeros(size, dtype=torch.int64, device=device) for size in sizes))

    def add(self, ids: Tensor | Sequence[Tensor], slots: Tensor) -> None:
        """A step's, see `add_step`; on a CPU by the compiled kernel, if it is there.

        ids: int32 [T, K] of each layer, or [L, T, K]; slots: integer [T] or fewer, of the first rows. A row with a
        lesser one than `first_slot`, or none, only pads the step.
        """
        if choices.takes(slots):
            of_layers, ranks = tuple(ids), (self._rank_of_expert, self.ranks)
            choices.add_step(*self._sums, of_layers, slots, self._first_slot, *ranks)
        else:
            is_real = (slots >= self._first_slot).long()
            ids = stacked(ids)[:, : len(slots)]
            add_step(self._sums, ids, is_real, self.n_routed_experts, self._rank_of_expert, self.ranks)

    def totals(self) -> list[LayerTotals]:
        """By layer. Waits for the device, so not to be called by what makes the steps."""
        tokens, busiest_expert, busiest_rank = (total.tolist() for total in self._sums)
        of_layers = zip(map(tuple, tokens), busiest_expert, busiest_rank, strict=True)
        return [LayerTotals(*of_layer) for of_layer in of_layers]
