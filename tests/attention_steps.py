"""Steps of an engine for attention over a paged latent cache, with dense attention in float64 beside them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from longcat_core.layers.latent_attention import PagedBatch, UpProjection, paged_attention, write_latents

SCALE = 0.3


@dataclass(frozen=True)
class Step:
    """One engine step: requests with their whole latents, of which the last `new` are this step's tokens."""

    queries: list[Tensor]  # [new, heads, nope + rope], one for each request
    latents: list[Tensor]  # [length, L + rope]
    w_uk: Tensor
    w_uv: Tensor
    block_size: int
    block_table: Tensor
    seed: int

    @property
    def latent(self) -> int:
        return self.w_uk.shape[2]

    def to(self, dtype: torch.dtype) -> Step:
        return replace(
            self,
            queries=[query.to(dtype) for query in self.queries],
            latents=[latents.to(dtype) for latents in self.latents],
            w_uk=self.w_uk.to(dtype),
            w_uv=self.w_uv.to(dtype),
        )

    def cache(self) -> Tensor:
        """The cache before this step: earlier tokens in their slots, and what others left in all the rest."""
        blocks = int(self.block_table.max()) + 2
        shape = blocks * self.block_size, self.latents[0].shape[1]
        cache = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed)) * 100
        cache = cache.to(self.w_uk.dtype)
        for request, (query, latents) in enumerate(zip(self.queries, self.latents, strict=True)):
            for position in range(len(latents) - len(query)):
                cache[self.slot(request, position)] = latents[position]
        return cache

    def slot(self, request: int, position: int) -> int:
        block = int(self.block_table[request, position // self.block_size])
        return block * self.block_size + position % self.block_size

    def run(self, attend: Callable[..., Tensor] = paged_attention) -> Tensor:
        """As an engine does: write this step's tokens, then attend."""
        cache, starts = self.cache(), [0]
        for request, (query, latents) in enumerate(zip(self.queries, self.latents, strict=True)):
            new = range(len(latents) - len(query), len(latents))
            slots = torch.tensor([self.slot(request, position) for position in new], dtype=torch.int64)
            rows = latents[len(latents) - len(query) :]
            write_latents(cache, rows[:, : self.latent], rows[:, self.latent :], slots)
            starts.append(starts[-1] + len(query))
        lengths = [len(latents) for latents in self.latents]
        batch = PagedBatch(starts, lengths, self.block_table, self.block_size)
        return attend(torch.cat(self.queries), cache, batch, up_projection(self.w_uk, self.w_uv), SCALE)

    def truth(self) -> Tensor:
        pairs = zip(self.queries, self.latents, strict=True)
        return torch.cat([dense(query, latents, self.w_uk, self.w_uv) for query, latents in pairs])


def up_projection(w_uk: Tensor, w_uv: Tensor) -> UpProjection:
    heads, nope = w_uk.shape[:2]
    return UpProjection.of(torch.cat((w_uk, w_uv), dim=1).flatten(0, 1), heads, nope)


def dense(queries: Tensor, latents: Tensor, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """One request in float64: each query sees the keys up to its own position."""
    queries, latents, w_uk, w_uv = (t.double() for t in (queries, latents, w_uk, w_uv))
    rank, rows = w_uk.shape[2], []
    rope_keys = latents[:, None, rank:].expand(-1, w_uk.shape[0], -1)
    keys = torch.cat((torch.einsum("nl,hpl->nhp", latents[:, :rank], w_uk), rope_keys), dim=-1)
    values = torch.einsum("nl,hvl->nhv", latents[:, :rank], w_uv)
    for index, query in enumerate(queries):
        seen = len(latents) - len(queries) + index + 1
        weights = (torch.einsum("hd,nhd->hn", query, keys[:seen]) * SCALE).softmax(dim=-1)
        rows.append(torch.einsum("hn,nhv->hv", weights, values[:seen]))
    return torch.stack(rows) if rows else values.new_empty(0, *values.shape[1:])


def step(
    requests: Sequence[tuple[int, int]],
    block_size: int = 8,
    seed: int = 0,
    sizes: tuple[int, int, int, int, int] = (2, 6, 4, 8, 5),
) -> Step:
    """`requests`: how many tokens each had before, and has now anew; `sizes`: heads, nope, rope, latent, v."""
    heads, nope, rope, latent, value = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    lengths = [before + new for before, new in requests]
    blocks = [-(-length // block_size) for length in lengths]
    shuffled = (torch.randperm(sum(blocks), generator=generator) + 1).split(blocks)  # block 0 is nobody's
    block_table = torch.zeros(len(requests), max([1, *blocks]) + 1, dtype=torch.int32)
    for row, own in zip(block_table, shuffled, strict=True):
        row[: len(own)] = own
    return Step(
        queries=[normal(new, heads, nope + rope) for _, new in requests],
        latents=[normal(length, latent + rope) for length in lengths],
        w_uk=normal(heads, nope, latent) * latent**-0.5,
        w_uv=normal(heads, value, latent) * latent**-0.5,
        block_size=block_size,
        block_table=block_table,
        seed=seed,
    )


decodes = st.tuples(st.integers(0, 40), st.just(1))
verifications = st.tuples(st.integers(0, 40), st.integers(2, 5))
prompts = st.tuples(st.just(0), st.integers(1, 40))
chunks = st.tuples(st.integers(1, 30), st.integers(6, 30))
idle = st.tuples(st.integers(1, 9), st.just(0))
steps = st.builds(
    step,
    requests=st.lists(decodes | verifications | prompts | chunks | idle, min_size=1, max_size=6),
    block_size=st.sampled_from([1, 7, 8, 16]),
    seed=st.integers(0, 2**31),
    # Values wider and narrower than keys; latents both small and large beside the heads.
    sizes=st.sampled_from([(2, 6, 4, 8, 5), (1, 4, 2, 32, 4), (3, 8, 8, 16, 20), (3, 5, 2, 3, 7)]),
)
