"""Which rank holds which experts: placed by the rows that steps gave them, so that the busiest rank has few of them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

EVEN_ENOUGH = 1.005
"""A rank has no swaps if it is not busier than so much of what each would be if all were alike, by chance alone. Chance
in what was counted is as much."""
LEAST_GAIN = 1e-3
"""What a swap has to take off the busier of its two ranks, as a share of that."""
LEAST_GAIN_OF_A_REPLICA = 0.05
"""What the busiest expert has to be above another with one replica less, to be given that."""


@dataclass(frozen=True)
class Placement:
    """Ranks are in the order of the engines' physical experts: rank r has those from r * slots on."""

    experts: Ints
    """[layers, ranks, slots of a rank]: the FFN expert in each slot, -1 where a slot is empty."""

    @property
    def physical_to_logical(self) -> Ints:
        """[layers, ranks * slots]: the map that both engines have under this name."""
        return self.experts.reshape(len(self.experts), -1)

    def replicas(self, experts: int) -> Ints:
        """[layers, experts]: on how many slots each of so many FFN experts is."""
        return np.stack([np.bincount(layer[layer >= 0], minlength=experts) for layer in self.physical_to_logical])

    def rank_rows(self, rows: Floats) -> Floats:
        """rows [..., layers, experts] -> [..., layers, ranks], an expert's rows split evenly over its replicas."""
        share = rows / self.replicas(rows.shape[-1]).clip(min=1)
        padded = np.concatenate([share, np.zeros_like(share[..., :1])], axis=-1)  # -1 is the last
        layers = np.arange(len(self.experts))[:, None, None]
        return padded[..., layers, self.experts].sum(axis=-1)

    def received(self, before: Placement) -> Ints:
        """[layers]: experts that have to be sent to a rank that did not have them before."""
        return np.array(
            [
                sum(len(np.setdiff1d(new[new >= 0], old)) for new, old in zip(*layers, strict=True))
                for layers in zip(self.experts, before.experts, strict=True)
            ]
        )


def step_rows(steps: Sequence[Ints], experts: int) -> Floats:
    """What `place` reads of one layer: ids of each step's choices [tokens, K] -> rows of FFN experts [steps, experts].

    Zero experts are not counted, whether they are -1, as in `Routing`, or numbered after the FFN experts.
    """
    return np.stack([np.bincount(ids[(ids >= 0) & (ids < experts)], minlength=experts) for ids in steps]).astype(float)


def counted_rows(counts: Floats) -> Floats:
    """What `place` reads of an engine's counts: [steps, layers, experts] -> [as many steps or fewer, layers, experts].

    Steps of which nothing was counted are left out, as a recorder has room for more than it has met. What all counts
    have as a common divisor is divided out: ranks that compute the same tokens each count all of their rows, and a
    recorder adds them up. Of R ranks each count is then R times the rows, and differs by more than chance explains.
    """
    counts = counts[counts.any(axis=(1, 2))]
    whole = counts.astype(np.int64)
    if (whole != counts).any() or not whole.any():
        return counts
    return counts / np.gcd.reduce(whole, axis=None)


def linear(layers: int, experts: int, ranks: int, redundant: int = 0) -> Placement:
    """Experts in order, then the first `redundant` of them again, as evenly as can be: where engines begin."""
    order = np.arange(experts + redundant) % experts
    placed = np.full((ranks, -(-len(order) // ranks)), -1)
    for rank, part in zip(placed, np.array_split(order, ranks), strict=True):
        rank[: len(part)] = part
    return Placement(np.tile(placed, (layers, 1, 1)))


def deviations_of_the_busiest(ranks: int) -> float:
    """By how many standard deviations the greatest of `ranks` normal deviates exceeds their mean, about."""
    return math.sqrt(2 * math.log(ranks))


def place(
    rows: Floats,
    ranks: int,
    redundant: int = 0,
    *,
    ranks_a_node: int | None = None,
    current: Placement | None = None,
    most_received: int | None = None,
) -> Placement:
    """Place every expert once and `redundant` of them again, so that each layer's busiest rank has few rows in a step.

    rows: [steps, layers, experts], rows of FFN experts in each of some steps; choices of zero experts are none. One
    step stands for the mean of steps alone. The more steps, the better is known which experts are busy together.

    A rank's rows in a step have a mean, a variance of chance, which is the mean again, and one of what moves many
    experts at once, as when tokens of one language become more (`_common_changes`). How busy a rank is: its mean, and
    as many deviations as the greatest of so many normal deviates is from theirs. The busiest rank is to be less busy:
    1. The busiest expert gets one more replica, as long as there are redundant ones.
    2. Each replica, the busiest first, goes to the least busy rank with room (the greedy packing of engines).
    3. Of all swaps of an expert of the busiest rank with one elsewhere that is made which leaves the busier of the two
       ranks least busy; again, and where none helps for the next busiest, until no rank is busier
       than one with the mean and chance alone.
    A swap of step 3 looks at (slots of a rank) x (slots of all ranks) pairs, each by a product over common changes.

    Replicas of an expert are on different ranks, and as evenly on nodes as there is room. With `current`, steps 1 and 2
    change what they must, step 3 begins there, and `most_received` bounds how many experts of a layer are sent to ranks
    that do not have them, beside those that `current` has twice on a rank. Where the ranks do not divide the slots,
    some stay empty, which no engine takes.

    Raises:
        ValueError: if a number does not fit the others, or no row was counted in a layer.
    """
    _, layers, experts = rows.shape
    slots = -(-(experts + redundant) // ranks)
    if not 0 <= redundant <= experts * (ranks - 1):
        raise ValueError(f"{redundant} redundant experts, wanted 0 to {experts * (ranks - 1)}: one replica a rank")
    if ranks_a_node is not None and ranks % ranks_a_node:
        raise ValueError(f"{ranks} ranks, wanted a multiple of the {ranks_a_node} of a node")
    if not rows.sum(axis=(0, 2)).all():
        raise ValueError("a layer in which no FFN expert was chosen")
    if current is not None:
        if current.experts.shape != (layers, ranks, slots):
            raise ValueError(f"a current placement of {current.experts.shape}, wanted {(layers, ranks, slots)}")
        replicas = current.replicas(experts)
        if replicas.shape[1] != experts or not replicas.all() or (replicas.sum(axis=1) != experts + redundant).any():
            raise ValueError(f"a current placement of other experts than {experts} and {redundant} redundant ones")
    return Placement(
        np.stack(
            [
                _Layer(
                    rows[:, layer],
                    np.full((ranks, slots), -1) if current is None else current.experts[layer],
                    ranks // (ranks_a_node or ranks),
                    most_received if current is not None else None,
                ).placed(experts + redundant)
                for layer in range(layers)
            ]
        )
    )


def place_while_serving(
    counts: Floats, ranks: int, redundant: int, *, ranks_a_node: int | None = None, current: Ints | None = None
) -> Ints:
    """One layer by what an engine has counted: [places], rank r has the r-th of equal parts, as `current` has them.

    counts: [steps, experts]. Where nothing was counted, experts stay where they are, or are in order. The other
    parameters are as those of `place`, with as many slots as experts.
    """
    rows = counted_rows(counts[:, None])
    before = None if current is None else Placement(current.reshape(1, ranks, -1))
    if not len(rows):
        return (before or linear(1, counts.shape[1], ranks, redundant)).physical_to_logical[0]
    return place(rows, ranks, redundant, ranks_a_node=ranks_a_node, current=before).physical_to_logical[0]


def _common_changes(rows: Floats) -> Floats:
    """What moves many experts at once from step to step: rows [steps, experts] -> [experts, changes].

    Their products are the covariances of experts beyond those of chance. In units of their own chance, steps without
    any have singular values below 1 + sqrt(experts / steps) (Marchenko and Pastur), so only greater ones are kept, less
    what chance adds to them.
    """
    steps, experts = rows.shape
    if steps == 1:
        return np.zeros((experts, 0))
    chance = np.sqrt(rows.mean(axis=0))
    changes, noise = (rows - rows.mean(axis=0)) / chance.clip(min=1e-9), experts / (steps - 1)
    if steps > experts:  # the same, sooner
        values, columns = np.linalg.eigh(changes.T @ changes)
        variances, directions = values / (steps - 1), columns.T
    else:
        _, values, directions = np.linalg.svd(changes, full_matrices=False)
        variances = values**2 / (steps - 1)
    kept = variances > 1.05 * (1 + math.sqrt(noise)) ** 2
    return (directions[kept] * np.sqrt(variances[kept] - 1 - noise)[:, None]).T * chance[:, None]


class _Layer:
    """The search in one layer. Expert number `experts` stands for an empty slot; it has no rows."""

    def __init__(self, rows: Floats, current: Ints, nodes: int, most_received: int | None) -> None:
        """rows: [steps, experts]; current: [ranks, slots], -1 where a slot is empty."""
        self.experts, (self.ranks, slots) = rows.shape[1], current.shape
        self.mean, self.changes = rows.mean(axis=0), _common_changes(rows)
        self.deviations = deviations_of_the_busiest(self.ranks)
        self.slots = np.where(current < 0, self.experts, current)
        for rank in self.slots:  # engines' policies can put an expert twice on one
            _, first = np.unique(rank, return_index=True)
            rank[np.setdiff1d(np.arange(slots), first)] = self.experts
        self.nodes, self.node_of_rank = nodes, np.arange(self.ranks) * nodes // self.ranks
        self.rank_of_slot = np.repeat(np.arange(self.ranks), slots)
        self.held = self._is_on(self.slots)
        self.budget = self.ranks * slots if most_received is None else most_received

    def placed(self, replicas: int) -> Ints:
        """[ranks, slots] with so many replicas of experts, -1 where a slot is empty."""
        present = np.bincount(self.slots[self.slots < self.experts], minlength=self.experts)
        counts = self._counts(present, replicas)
        self.share = np.append(self.mean / counts, 0)
        self.changes_of_one = np.append(self.changes / counts[:, None], np.zeros((1, self.changes.shape[1])), axis=0)
        self.a_node = np.append(-(-counts // self.nodes), self.slots.size)
        for expert in np.flatnonzero(present > counts):
            self._drop(expert, present[expert] - counts[expert])
        missing = np.repeat(np.arange(self.experts), (counts - present).clip(min=0))
        for expert in missing[np.argsort(-self.share[missing], kind="stable")]:
            self._add(expert)
        self._swap()
        return np.where(self.slots == self.experts, -1, self.slots)

    def _busy(self, mean: Floats, squares: Floats) -> Floats:
        """Rows in a step in which this is the busiest; squares: the sum of the squared common changes."""
        return mean + self.deviations * np.sqrt(mean + squares)

    def _counts(self, present: Ints, replicas: int) -> Ints:
        """[experts]: replicas of each, beginning with those that are present, so that the busiest is least busy."""
        counts = present.clip(min=1)
        squares = (self.changes**2).sum(axis=1)

        def busy(counts: Ints) -> Floats:
            return self._busy(self.mean / counts, squares / counts**2)

        def with_one_more() -> Floats:
            """How busy an expert is that can have one more replica, 0 for others."""
            return np.where(counts < self.ranks, busy(counts), 0)

        while counts.sum() < replicas:
            counts[with_one_more().argmax()] += 1
        # One can cost two: the slot that becomes free can be on a rank that has the expert.
        for _ in range(self.budget // 2 if present.any() else 0):
            candidates, with_one_less = with_one_more(), np.where(counts > 1, busy((counts - 1).clip(min=1)), np.inf)
            gains, loses = candidates.argmax(), with_one_less.argmin()
            if with_one_less[loses] >= candidates[gains] * (1 - LEAST_GAIN_OF_A_REPLICA):
                break
            counts[gains] += 1
            counts[loses] -= 1
        return counts

    def _is_on(self, slots: Ints) -> NDArray[np.bool_]:
        """[experts + 1, ranks]; an empty slot is on none."""
        found = np.zeros((self.experts + 1, self.ranks), dtype=bool)
        found[slots, np.arange(self.ranks)[:, None]] = True
        found[self.experts] = False
        return found

    def _sums(self, ranks: Ints) -> tuple[Floats, Floats]:
        """Mean rows [ranks] and common changes [ranks, changes] of some ranks."""
        return self.share[self.slots[ranks]].sum(axis=-1), self.changes_of_one[self.slots[ranks]].sum(axis=-2)

    def _busy_ranks(self) -> Floats:
        mean, changes = self._sums(np.arange(self.ranks))
        return self._busy(mean, (changes**2).sum(axis=-1))

    def _drop(self, expert: int, replicas: int) -> None:
        for _ in range(replicas):
            on = (self.slots == expert).any(axis=-1)
            rank = int(np.where(on, self._busy_ranks(), -1).argmax())
            self.slots[rank, np.argmax(self.slots[rank] == expert)] = self.experts

    def _add(self, expert: int) -> None:
        """On the least busy rank with an empty slot and without the expert, on a node with few of it."""
        busy = self._busy_ranks()
        is_free, is_on = (self.slots == self.experts).any(axis=-1), (self.slots == expert).any(axis=-1)
        here = np.bincount(self.node_of_rank[is_on], minlength=self.nodes)[self.node_of_rank]
        allowed = is_free & ~is_on
        if (allowed & (here < self.a_node[expert])).any():
            allowed &= here < self.a_node[expert]
        rank = int(np.where(allowed, busy, np.inf).argmin())
        if not allowed.any():
            # Every rank with room has the expert. A full one without it has one that a rank with room has not.
            rank = int(np.where(is_on, np.inf, busy).argmin())
            room = int(np.where(is_free, busy, np.inf).argmin())
            other = np.setdiff1d(self.slots[rank], self.slots[room])[0]
            self.slots[rank, self.slots[rank] == other] = self.experts
            self.slots[room, np.argmax(self.slots[room] == self.experts)] = other
        self.slots[rank, np.argmax(self.slots[rank] == self.experts)] = expert

    def _swap(self) -> None:
        mean, changes = self._sums(np.arange(self.ranks))
        busy = self._busy(mean, (changes**2).sum(axis=-1))
        enough = EVEN_ENOUGH * self._busy(self.mean.sum() / self.ranks, np.zeros(1))[0]
        is_stuck = np.zeros(self.ranks, dtype=bool)
        left = self.budget - int((self._is_on(self.slots) & ~self.held).sum())
        while True:
            candidates = np.where(is_stuck, 0, busy)
            busiest = int(candidates.argmax())
            if candidates[busiest] <= enough:
                return
            after, sent = self._after_swaps(busiest, mean, changes), self._sent_by_swaps(busiest)
            after[self._forbidden(busiest) | (sent > left)] = np.inf
            mine, theirs = np.unravel_index(int(after.argmin()), after.shape)
            if after[mine, theirs] >= busy[busiest] * (1 - LEAST_GAIN):
                is_stuck[busiest] = True
                continue
            rank, slot = divmod(int(theirs), self.slots.shape[1])
            left -= int(sent[mine, theirs])
            self.slots[busiest, mine], self.slots[rank, slot] = self.slots[rank, slot], self.slots[busiest, mine]
            pair = np.array([busiest, rank])
            mean[pair], changes[pair] = self._sums(pair)
            busy[pair] = self._busy(mean[pair], (changes[pair] ** 2).sum(axis=-1))
            is_stuck[pair] = False

    def _after_swaps(self, busiest: int, mean: Floats, changes: Floats) -> Floats:
        """[slots of the busiest rank, all slots]: how busy the busier of both ranks is if their experts swap."""
        give, take, rank = self.slots[busiest], self.slots.reshape(-1), self.rank_of_slot
        less = changes[busiest] - self.changes_of_one[give]
        others = changes[rank] - self.changes_of_one[take]
        given, taken = self.changes_of_one[give], self.changes_of_one[take]
        here = (less**2).sum(-1)[:, None] + 2 * less @ taken.T + (taken**2).sum(-1)
        there = (others**2).sum(-1) + 2 * given @ others.T + (given**2).sum(-1)[:, None]
        more = self.share[take] - self.share[give][:, None]
        # Rounding can leave a hair less than nothing of a rank that gives all it has.
        return np.maximum(
            self._busy((mean[busiest] + more).clip(min=0), here.clip(min=0)),
            self._busy((mean[rank] - more).clip(min=0), there.clip(min=0)),
        )

    def _forbidden(self, busiest: int) -> NDArray[np.bool_]:
        """Swaps within a rank, and those that put an expert twice on a rank, or too often on a node."""
        give, take, rank = self.slots[busiest], self.slots.reshape(-1), self.rank_of_slot
        is_on = self._is_on(self.slots)
        found = is_on[give][:, rank] | is_on[take, busiest] | (rank == busiest)
        if self.nodes > 1:
            on_node = np.stack([is_on[:, self.node_of_rank == node].sum(axis=1) for node in range(self.nodes)], axis=1)
            is_full = on_node >= self.a_node[:, None]
            here, there = self.node_of_rank[busiest], self.node_of_rank[rank]
            found |= (is_full[give][:, there] | is_full[take, here]) & (here != there)
        return found

    def _sent_by_swaps(self, busiest: int) -> Ints:
        """[slots of the busiest rank, all slots]: how many more experts a swap has sent to ranks that have them not."""
        give, take, rank = self.slots[busiest], self.slots.reshape(-1), self.rank_of_slot
        new = ~self.held
        new[self.experts] = False
        there = new[give][:, rank].astype(int) - new[take, rank]
        return there + new[take, busiest] - new[give, busiest][:, None].astype(int)
