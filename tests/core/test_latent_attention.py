"""Attention over a paged latent cache against dense attention in float64, request by request."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longcat_core.layers import latent_attention
from longcat_core.layers.latent_attention import (
    PagedBatch,
    RequestGroup,
    paged_attention,
    write_latents,
)
from tests.attention_steps import SCALE, Step, dense, step, steps, up_projection
from tests.oracle import relative_error


@given(steps)
def test_paged_attention_is_dense_attention(case: Step) -> None:
    output, truth = case.run(), case.truth()
    assert output.shape == truth.shape
    torch.testing.assert_close(output.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_prefill", [False, True])
@given(case=steps)
def test_either_way_of_attending_fits_every_step(is_prefill: bool, case: Step) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_attention, "is_prefill", lambda *_: is_prefill)
        torch.testing.assert_close(case.run().double(), case.truth(), rtol=1e-4, atol=1e-5)


@given(steps)
def test_bounds_on_temporaries_change_nothing(case: Step) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_attention, "_PAIRS_AT_ONCE", 50)
        patch.setattr(latent_attention, "_SLOTS_AT_ONCE", 50)
        patch.setattr(latent_attention, "_EXPANDED_AT_ONCE", 50)
        torch.testing.assert_close(case.run().double(), case.truth(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_prefill", [False, True])
@given(case=steps)
def test_bf16_is_as_good_as_its_roundings(is_prefill: bool, case: Step) -> None:
    case = case.to(torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_attention, "is_prefill", lambda *_: is_prefill)
        output = case.run()
    assert output.dtype == torch.bfloat16
    if output.numel():
        assert relative_error(output, case.truth()) < 2**-5


def paths_taken(case: Step) -> set[str]:
    taken: set[str] = set()

    def noting(name: str) -> Callable[..., Tensor]:
        attend = getattr(latent_attention, name)
        return lambda *arguments: (taken.add(name), attend(*arguments))[1]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_attend_absorbed", "_attend_expanded"):
            patch.setattr(latent_attention, name, noting(name))
        case.run()
    return taken


@pytest.mark.parametrize(
    ("requests", "paths"),
    [
        ([(30, 1), (3, 1)], {"_attend_absorbed"}),
        ([(30, 4)], {"_attend_absorbed"}),
        ([(0, 40)], {"_attend_expanded"}),
        ([(20, 30)], {"_attend_expanded"}),
        ([(0, 40), (12, 1), (20, 3)], {"_attend_absorbed", "_attend_expanded"}),
    ],
)
def test_prompts_are_expanded_and_decodes_absorbed(requests: list[tuple[int, int]], paths: set[str]) -> None:
    assert paths_taken(step(requests)) == paths


@pytest.mark.parametrize("block_size", [1, 7, 8, 16])
def test_a_prompt_in_chunks_is_the_whole_prompt(block_size: int) -> None:
    whole = step([(0, 45)], block_size)
    truth = whole.truth()
    bounds = [0, 20, 21, 40, 45]
    for first, last in itertools.pairwise(bounds):
        chunk = replace(whole, queries=[whole.queries[0][first:last]], latents=[whole.latents[0][:last]])
        torch.testing.assert_close(chunk.run().double(), truth[first:last], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 7, 8, 16])
def test_requests_may_share_the_blocks_of_a_prefix(block_size: int) -> None:
    shared = 2 * block_size
    case = step([(shared, 3), (shared, 20), (shared + 5, 1)], block_size)
    case.block_table[1:, :2] = case.block_table[0, :2]
    for latents in case.latents[1:]:
        latents[:shared] = case.latents[0][:shared]
    torch.testing.assert_close(case.run().double(), case.truth(), rtol=1e-4, atol=1e-5)


def test_a_batch_is_each_request_alone() -> None:
    case = step([(30, 1), (9, 1), (16, 1), (17, 1), (0, 20), (12, 4)])
    together = case.run().split([len(query) for query in case.queries])
    for request, output in enumerate(together):
        alone = replace(
            case,
            queries=[case.queries[request]],
            latents=[case.latents[request]],
            block_table=case.block_table[request : request + 1],
        )
        torch.testing.assert_close(alone.run(), output, rtol=1e-4, atol=1e-5)


def test_decodes_of_like_length_attend_in_one_group() -> None:
    lengths = [17, 30, 16, 31, 200]
    batch = PagedBatch(list(range(6)), lengths, torch.zeros(5, 200, dtype=torch.int32), 1)
    grouped = sorted(sorted(group.queries.flatten().tolist()) for group in batch.groups)
    assert grouped == [[0, 1, 2, 3], [4]]


def test_a_query_sees_the_slots_up_to_its_own() -> None:
    group = RequestGroup(torch.zeros(1, 2), torch.zeros(1, 5), torch.tensor([[2, 3]]), False, is_all_visible=False)
    assert group.visible().tolist() == [[[True, True, True, False, False], [True, True, True, True, False]]]


def test_more_new_tokens_than_context_is_an_error() -> None:
    with pytest.raises(ValueError, match="request 1: 3 new tokens, wanted at most its length 2"):
        PagedBatch([0, 1, 4], [1, 2], torch.zeros(2, 1, dtype=torch.int32), 16)


def test_slot_minus_one_stores_nothing() -> None:
    cache = torch.zeros(4, 3)
    write_latents(cache, torch.ones(3, 2), torch.full((3, 1), 2.0), torch.tensor([2, -1, 0]))
    assert cache.tolist() == [[1, 1, 2], [0, 0, 0], [1, 1, 2], [0, 0, 0]]


@settings(deadline=None)  # the first call in a process is slow
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 8), st.integers(0, 2**31))
def test_a_node_attends_to_its_request_and_its_path(lengths: list[int], nodes: int, seed: int) -> None:
    heads, nope, rope, rank, value = 2, 6, 4, 8, 5
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    parents = [[int(torch.randint(node, (), generator=generator)) for node in range(1, nodes)] for _ in lengths]
    trees = torch.eye(nodes, dtype=torch.bool).repeat(len(lengths), 1, 1)
    for tree, above in zip(trees, parents, strict=True):
        for node, parent in enumerate(above, start=1):
            tree[node] |= tree[parent]
    cache = normal(1 + sum(length + nodes for length in lengths), rank + rope)
    table = torch.zeros(len(lengths), max(lengths) + nodes, dtype=torch.int32)
    order = (torch.randperm(len(cache) - 1, generator=generator) + 1).split([n + nodes for n in lengths])
    for row, slots in zip(table, order, strict=True):
        row[: len(slots)] = slots
    queries = normal(len(lengths) * nodes, heads, nope + rope)
    w_uk, w_uv = normal(heads, nope, rank), normal(heads, value, rank)
    starts = range(0, len(queries) + 1, nodes)
    batch = PagedBatch(starts, [n + nodes for n in lengths], table, 1, trees)
    ours = paged_attention(queries, cache, batch, up_projection(w_uk, w_uv), SCALE).view(
        len(lengths), nodes, heads, value
    )
    for r, (length, slots) in enumerate(zip(lengths, order, strict=True)):
        for node in range(nodes):
            seen = torch.cat((slots[:length], slots[length:][trees[r, node]]))
            alone = dense(queries[r * nodes + node].unsqueeze(0), cache[seen], w_uk, w_uv)[0]
            torch.testing.assert_close(ours[r, node].double(), alone, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes, views of a table not counted."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.elements = 0
        self._table = table.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.untyped_storage().data_ptr() != self._table:
            self.elements = max(self.elements, output.numel())
        return output


@pytest.mark.parametrize("block_size", [1, 16])
def test_of_a_table_as_wide_as_the_models_context_only_the_blocks_in_use_are_read(block_size: int) -> None:
    """Else a step of short requests costs as much as a table of all contexts."""
    lengths, width = [40, 30, 55], 131_072 // block_size
    table = torch.arange(4 * width, dtype=torch.int32).view(4, width)
    with Largest(table) as largest:
        groups = PagedBatch([0, 1, 2, 3], lengths, table, block_size, table_rows=[3, 0, 2]).groups
    assert 0 < largest.elements <= len(lengths) * max(lengths)
    for group in groups:
        for request, slots in zip(group.queries[:, 0].tolist(), group.slots, strict=True):
            first = [3, 0, 2][request] * width * block_size
            assert slots[: lengths[request]].tolist() == list(range(first, first + lengths[request]))


@pytest.mark.parametrize("new", [1, 3])
def test_temporaries_of_decoding_do_not_grow_with_the_context(new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_attention, "_SLOTS_AT_ONCE", 60)
    requests, heads, rank, rope = 5, 2, 8, 4
    largest = {}
    for length in (100, 1000):
        cache = torch.randn(requests * length, rank + rope)
        table = torch.randperm(requests * length).view(requests, length)
        batch = PagedBatch(range(0, requests * new + 1, new), [length] * requests, table, 1)
        queries = torch.randn(requests * new, heads, 6 + rope)
        up = up_projection(torch.randn(heads, 6, rank), torch.randn(heads, 6, rank))
        with Largest(cache) as seen:
            paged_attention(queries, cache, batch, up, SCALE)
        largest[length] = seen.elements
    # But for which slots a query sees, a bit each.
    assert largest[1000] <= max(largest[100], requests * new * 1000)
    assert largest[100] < requests * 100 * (rank + rope)


@pytest.mark.parametrize("is_expanded", [True, False])
def test_the_scores_of_a_long_chunk_are_made_in_bounded_parts(
    is_expanded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its 64 tokens by 128 slots would be 8,192 pairs, in latent space of three heads 24,576 scores."""
    monkeypatch.setattr(latent_attention, "_PAIRS_AT_ONCE", 512)
    monkeypatch.setattr(latent_attention, "_SCORES_AT_ONCE", 3 * 512)
    heads, nope, rope = 1 if is_expanded else 3, 4, 2
    latent = 8 if is_expanded else 2
    batch = PagedBatch([0, 64], [128], torch.arange(128).view(1, -1), 1)
    masks: list[int] = []
    visible = RequestGroup.visible

    def noting(group: RequestGroup, *bounds: int) -> Tensor:
        mask = visible(group, *bounds)
        masks.append(mask.numel())
        return mask

    monkeypatch.setattr(RequestGroup, "visible", noting)
    cache = torch.randn(128, latent + rope)
    up = up_projection(torch.randn(heads, nope, latent), torch.randn(heads, nope, latent))
    queries = torch.randn(64, heads, nope + rope)
    attended = paged_attention(queries, cache, batch, up, SCALE)
    assert masks == [512] * 16
    monkeypatch.setattr(latent_attention, "_PAIRS_AT_ONCE", 1 << 20)
    monkeypatch.setattr(latent_attention, "_SCORES_AT_ONCE", 1 << 20)
    torch.testing.assert_close(attended, paged_attention(queries, cache, batch, up, SCALE))
