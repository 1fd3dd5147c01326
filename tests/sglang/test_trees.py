"""Drafts that branch: what a node of a tree attends to, and that trees change no token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_core.latent_attention import PagedBatch, paged_attention
from tests.cases import CASES, drafting_tensors, write_checkpoint
from tests.core.test_latent_attention import SCALE, dense
from tests.sglang.engine import serving
from tests.speculation import truth

CASE = CASES["default"]
NEW_TOKENS = 24


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
    batch = PagedBatch.build(starts, [n + nodes for n in lengths], table, 1, trees)
    ours = paged_attention(queries, cache, batch, w_uk, w_uv, SCALE).view(len(lengths), nodes, heads, value)
    for r, (length, slots) in enumerate(zip(lengths, order, strict=True)):
        for node in range(nodes):
            seen = torch.cat((slots[:length], slots[length:][trees[r, node]]))
            alone = dense(queries[r * nodes + node].unsqueeze(0), cache[seen], w_uk, w_uv)[0]
            torch.testing.assert_close(ours[r, node].double(), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("steps", "branches", "nodes"), [(1, 3, 3), (2, 2, 5), (3, 3, 8)])
def test_trees_change_no_token(steps: int, branches: int, nodes: int, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, CASE.config, drafting_tensors(CASE.config))
    prompts = [CASE.prompts(1, length, seed=length)[0] for length in (1, 3, 17, 40, 70)]
    tree = {
        "speculative_algorithm": "EAGLE",
        "speculative_num_steps": steps,
        "speculative_eagle_topk": branches,
        "speculative_num_draft_tokens": nodes,
    }
    chains = [truth(CASE, prompt, NEW_TOKENS, min(steps, nodes - 1)) for prompt in prompts]
    with serving(directory, **tree) as served:
        answers = served.speculated(prompts, NEW_TOKENS)
        assert [answer.tokens for answer in answers] == [chain.tokens for chain in chains]
        assert served.greedy(prompts, NEW_TOKENS) == [chain.tokens for chain in chains], "from the cache"
    taken, alone = (sum(len(each.accepted) for each in them) for them in (answers, chains))
    assert taken < alone, "a tree needs fewer steps than its chain"
