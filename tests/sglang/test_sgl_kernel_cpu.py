"""What stands in for `sgl_kernel` does what its names say, against loops over requests and paths through trees."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longcat_sglang.devices.cpu import sgl_kernel as kernel

FULL_MASK, TREE_ONLY = 0, 1
seeds = st.integers(0, 2**31)


def requests(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of a table of 9 requests of up to 40 slots, from a start to an end; any order, and some empty."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 6, (), generator=generator))
    rows = torch.randperm(9, generator=generator)[:count]
    starts = torch.randint(0, 30, (count,), generator=generator)
    ends = starts + torch.randint(0, 10, (count,), generator=generator)
    table = torch.randperm(9 * 40, generator=generator).view(9, 40).int()
    return rows, table, starts, ends


@given(seeds)
def test_slots_are_read_row_by_row(seed: int) -> None:
    rows, table, starts, ends = requests(seed)
    wanted = [slot for row, a, b in zip(rows, starts, ends, strict=True) for slot in table[row, a:b].tolist()]
    slots = torch.full((len(wanted) + 3,), -7)
    kernel.assign_extend_cache_locs_cpu(rows, table, starts, ends, slots, table.shape[1])
    assert slots.tolist() == wanted + [-7] * 3


@given(seeds)
def test_slots_are_written_row_by_row(seed: int) -> None:
    rows, table, starts, ends = requests(seed)
    slots = torch.arange(1000, 1000 + int((ends - starts).sum()))
    wanted, left = table.clone(), slots.tolist()
    for row, a, b in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
        for column in range(a, b):
            wanted[row, column] = left.pop(0)
    kernel.assign_req_to_token_pool_cpu(rows, table, starts, ends, slots, table.shape[1])
    assert table.equal(wanted)


@pytest.mark.parametrize(("topk", "steps"), [(1, 1), (1, 4), (3, 2)])
@given(seed=seeds)
def test_drafts_get_the_slots_after_their_request(topk: int, steps: int, seed: int) -> None:
    rows, table, lengths, _ = requests(seed)
    slots = torch.empty(len(rows) * topk * steps, dtype=torch.int64)
    kernel.assign_draft_cache_locs_contiguous_cpu(rows, table, lengths, slots, table.shape[1], topk, steps)
    for row, length, ours in zip(rows, lengths.tolist(), slots.view(len(rows), -1), strict=True):
        assert ours.tolist() == table[row, length : length + topk * steps].tolist()


def test_slots_of_accepted_nodes_come_to_the_front() -> None:
    slots = torch.full((6,), -7)
    accepted = torch.tensor([[0, 2, -1], [4, -1, -1]], dtype=torch.int32)
    kernel.fill_accept_out_cache_loc_cpu(accepted, torch.tensor([50, 51, 52, 53, 54, 55]), slots)
    assert slots.tolist() == [50, 52, 54, -7, -7, -7]


def test_the_bonus_token_is_the_last_of_each_path() -> None:
    bonus = torch.full((3,), -7, dtype=torch.int32)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32)
    kernel.fill_bonus_tokens_cpu(tokens, torch.tensor([1, 3], dtype=torch.int32), bonus, 3)
    assert bonus.tolist() == [1, 6, -7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_caches_are_copied_by_address(dtype: torch.dtype) -> None:
    caches = [torch.randn(8, 1, width).to(dtype) for width in (5, 3)]
    targets, sources = torch.tensor([0, 1, 6]), torch.tensor([1, 4, 6])
    wanted = [cache.clone() for cache in caches]
    for cache in wanted:
        cache[targets] = cache[sources].clone()
    addresses = torch.tensor([cache.data_ptr() for cache in caches])
    strides = torch.tensor([cache[0].numel() * cache.element_size() for cache in caches])
    kernel.copy_all_layer_kv_cache_cpu(addresses, strides, targets, sources)
    kernel.copy_all_layer_kv_cache_cpu(addresses, strides, targets[:0], sources[:0])
    assert all(ours.equal(theirs) for ours, theirs in zip(caches, wanted, strict=True))


class Tree(NamedTuple):
    """The drafts of one request, as SGLang's worker writes them down (`select_top_k_tokens`)."""

    parents: list[int]
    selected: list[int]
    paths: list[list[int]]
    """Of each node, the root's being empty: the nodes from the root's child down to it."""


def tree(draw: random.Random, topk: int, steps: int, nodes: int, with_orphan: bool = False) -> Tree:
    """Candidates 0 to topk - 1 are the root's children; each later step gives `topk` of the last step's candidates
    `topk` children each. Nodes are drawn so that a parent comes before its child, but for an orphan at the end."""
    parents, path_of = [-1, *range(topk)], {candidate: [candidate] for candidate in range(topk)}
    beam, first = list(range(topk)), topk
    for step in range(1, steps):
        level = range(first, first + topk * topk)
        for candidate in level:
            path_of[candidate] = [*path_of[beam[(candidate - first) // topk]], candidate]
        beam, first = draw.sample(level, topk), first + topk * topk
        if step < steps - 1:
            parents += beam
    chosen: list[int] = []
    while len(chosen) < nodes - 1 - with_orphan:
        ready = [c for c, path in path_of.items() if c not in chosen and set(path[:-1]) <= set(chosen)]
        chosen.append(draw.choice(ready))
    if with_orphan:
        chosen.append(next(c for c, path in path_of.items() if not set(path[:-1]) <= set(chosen)))
    chosen.sort()
    node_of = {candidate: node for node, candidate in enumerate(chosen, start=1)}
    return Tree(parents, chosen, [[], *([node_of.get(c, -1) for c in path_of[candidate]] for candidate in chosen)])


class Built(NamedTuple):
    mask: Tensor
    positions: Tensor
    numbers: Tensor
    children: Tensor
    siblings: Tensor


def build(trees: list[Tree], lengths: list[int], topk: int, steps: int, mask: Tensor, mode: int) -> Built:
    count, nodes = len(trees), len(trees[0].paths)
    links = torch.full((3, count, nodes), -1)
    positions = torch.full((count * nodes,), -7)
    kernel.build_tree_kernel_efficient_cpu(
        torch.tensor([each.parents for each in trees])[:, : 1 + topk * (steps - 1) if steps > 1 else 0],
        torch.tensor([each.selected for each in trees]),
        torch.tensor(lengths),
        mask,
        positions,
        *links,
        topk,
        steps,
        nodes,
        mode,
    )
    return Built(mask, positions.view(count, nodes), *links)


shapes = st.sampled_from([(1, 1, 2), (1, 4, 5), (2, 2, 4), (2, 3, 6), (3, 3, 8), (4, 2, 16)])
"""Children of a node, steps, nodes."""


@given(shapes, seeds)
def test_a_node_sees_its_ancestors_and_stands_behind_them(shape: tuple[int, int, int], seed: int) -> None:
    topk, steps, nodes = shape
    draw = random.Random(seed)
    trees = [tree(draw, topk, steps, nodes) for _ in range(3)]
    lengths = [draw.randint(1, 9) for _ in trees]
    built = build(trees, lengths, topk, steps, torch.ones(3 * nodes * nodes, dtype=torch.bool), TREE_ONLY)
    masks = built.mask.view(3, nodes, nodes)
    for each, length, mask, positions in zip(trees, lengths, masks, built.positions, strict=True):
        for node, path in enumerate(each.paths):
            assert mask[node].nonzero().flatten().tolist() == [0, *path], f"{node=}, {shape=}"
            assert positions[node] == length + len(path)


@given(shapes, seeds)
def test_links_lead_to_every_node_and_its_path(shape: tuple[int, int, int], seed: int) -> None:
    topk, steps, nodes = shape
    draw = random.Random(seed)
    trees = [tree(draw, topk, steps, nodes) for _ in range(3)]
    built = build(trees, [5] * 3, topk, steps, torch.ones(3 * nodes * nodes, dtype=torch.bool), TREE_ONLY)
    assert built.numbers.flatten().tolist() == list(range(3 * nodes))
    for each, children, siblings in zip(trees, built.children.tolist(), built.siblings.tolist(), strict=True):
        found: list[list[int]] = []

        def walk(
            path: list[int],
            node: int,
            found: list[list[int]] = found,
            children: list[int] = children,
            siblings: list[int] = siblings,
        ) -> None:
            found.append(path)
            child = children[node]
            while child != -1:
                walk([*path, child], child)
                child = siblings[child]

        walk([], 0)
        assert sorted(found) == sorted(each.paths)


@given(seeds)
def test_the_mask_may_hold_the_tokens_before_the_tree_in_each_row(seed: int) -> None:
    topk, steps, nodes = 2, 3, 6
    draw = random.Random(seed)
    trees, lengths = [tree(draw, topk, steps, nodes) for _ in range(3)], [draw.randint(1, 9) for _ in range(3)]
    full = torch.ones(sum(nodes * (length + nodes) for length in lengths), dtype=torch.bool)
    build(trees, lengths, topk, steps, full, FULL_MASK)
    bare = torch.ones(3 * nodes * nodes, dtype=torch.bool)
    build(trees, lengths, topk, steps, bare, TREE_ONLY)
    rows = full.split([nodes * (length + nodes) for length in lengths])
    for mask, length, wanted in zip(rows, lengths, bare.view(3, nodes, nodes), strict=True):
        mask = mask.view(nodes, length + nodes)
        assert mask[:, :length].all()
        assert mask[:, length:].equal(wanted)


def test_a_mask_in_bits_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="tree_mask_mode: 2"):
        build([tree(random.Random(0), 2, 2, 4)], [3], 2, 2, torch.ones(16, dtype=torch.bool), 2)


def test_a_node_without_its_parent_is_never_reached() -> None:
    drafts = tree(random.Random(0), 2, 3, 5, with_orphan=True)
    (orphan,) = [node for node, path in enumerate(drafts.paths) if -1 in path]
    built = build([drafts], [3], 2, 3, torch.ones(25, dtype=torch.bool), TREE_ONLY)
    assert orphan not in built.children.flatten().tolist() + built.siblings.flatten().tolist()
    assert built.mask.view(5, 5)[orphan].nonzero().flatten().tolist() == [0, orphan]


@given(shapes, seeds)
def test_the_longest_path_that_the_target_predicts_is_accepted(shape: tuple[int, int, int], seed: int) -> None:
    topk, steps, nodes = shape
    draw = random.Random(seed)
    trees = [tree(draw, topk, steps, nodes) for _ in range(3)]
    built = build(trees, [5] * 3, topk, steps, torch.ones(3 * nodes * nodes, dtype=torch.bool), TREE_ONLY)
    # Siblings differ, and are few enough that the target often predicts one.
    tokens = torch.tensor([[0] + [candidate % topk for candidate in each.selected] for each in trees])
    predicted = torch.tensor([[draw.randrange(topk + 1) for _ in range(nodes)] for _ in trees])
    predicts = torch.full((3 * nodes,), -7, dtype=torch.int32)
    accepted = torch.full((3, steps + 1), -1, dtype=torch.int32)
    counts = torch.full((3,), -7, dtype=torch.int32)
    kernel.verify_tree_greedy_cpu(
        predicts, accepted, counts, tokens, built.numbers, built.children, built.siblings, predicted
    )
    for r, each in enumerate(trees):
        agreed = [
            p for p in each.paths if all(tokens[r, b] == predicted[r, a] for a, b in zip([0, *p], p, strict=False))
        ]
        path = [0, *max(agreed, key=len)]
        assert counts[r] == len(path) - 1
        assert accepted[r].tolist() == [r * nodes + node for node in path] + [-1] * (steps + 1 - len(path))
        rows = predicts.view(3, nodes)[r]
        assert [int(rows[node]) for node in path] == [int(predicted[r, node]) for node in path]
        assert all(rows[node] == -7 for node in range(nodes) if node not in path)


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(ImportError):
        from longcat_sglang.devices.cpu.sgl_kernel import topk_softmax_cpu  # noqa: F401
    with pytest.raises(AttributeError, match=r"stand-in .* has no topk_softmax_cpu; for another model install"):
        _ = kernel.topk_softmax_cpu
