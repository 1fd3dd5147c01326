"""Decode steps on a CPU for FlashInfer's MLA, and what attention of each is; vLLM is not imported."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longcat_vllm.devices.cuda.decode_plan import DecodePlans, DecodeSizes, DecodeStep
from tests.vllm import flashinfer_mla

LATENT, ROPE, PAGE, HEADS, DRAFTS, MAX_PAGES = 8, 4, 16, 64, 3, 64
SCALE = 0.3
CPU = torch.device("cpu")


def plans(
    num_heads: int = HEADS, max_requests: int = 16, num_drafts: int = DRAFTS, dtype: torch.dtype = torch.float32
) -> DecodePlans:
    sizes = DecodeSizes(num_heads, LATENT, ROPE, PAGE, max_requests, MAX_PAGES, SCALE, dtype, dtype, num_drafts)
    return DecodePlans(sizes, CPU)


class Batch:
    """Requests with random caches, in pages that are spread at random; every place without a token is NaN."""

    def __init__(self, queries: Sequence[int], lengths: Sequence[int], num_heads: int = HEADS, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.queries, self.lengths, self.num_heads = list(queries), list(lengths), num_heads
        n = len(queries)
        self.table = torch.randperm(n * MAX_PAGES, generator=random).view(n, MAX_PAGES).int()
        self.latents = torch.full((n * MAX_PAGES, PAGE, LATENT), float("nan"))
        self.ropes = torch.full((n * MAX_PAGES, PAGE, ROPE), float("nan"))
        self.contexts = []
        for pages, length in zip(self.table.long(), lengths, strict=True):
            latent, rope = torch.randn(length, LATENT, generator=random), torch.randn(length, ROPE, generator=random)
            at = torch.arange(length)
            self.latents[pages[at // PAGE], at % PAGE], self.ropes[pages[at // PAGE], at % PAGE] = latent, rope
            self.contexts.append((latent, rope))
        self.query = (
            torch.randn(sum(queries), num_heads, LATENT, generator=random),
            torch.randn(sum(queries), num_heads, ROPE, generator=random),
        )

    def step(self, rejected: Sequence[int] | None = None, padding: int = 0) -> DecodeStep:
        """rejected: for each request, by how much the host believes it longer than it is; padding: requests."""
        counts = torch.tensor([0, *self.queries, *[0] * padding], dtype=torch.int32)
        lengths = torch.tensor(self.lengths + [0] * padding, dtype=torch.int32)
        more = torch.tensor([*(rejected or [0] * len(self.lengths)), *[7] * padding], dtype=torch.int32)
        wide = torch.cat((self.table, self.table.new_zeros(padding, MAX_PAGES))).repeat(1, 2)
        return DecodeStep(
            counts.cumsum(0, dtype=torch.int32),
            sum(self.queries) + padding * self.queries[0],
            lengths + more,
            lengths,
            wide[:, :MAX_PAGES],
        )

    def with_padding(self, padding: int) -> tuple[Tensor, Tensor]:
        nope, rope = (
            torch.cat((part, part.new_zeros(padding * self.queries[0], *part.shape[1:]))) for part in self.query
        )
        return nope, rope

    def attend(self, wrapper: flashinfer_mla.Wrapper, padding: int = 0) -> Tensor:
        return wrapper.run(query=self.with_padding(padding), kv_cache=(self.latents, self.ropes))

    def expected(self) -> Tensor:
        rows, first = [], 0
        for count, length, (latent, rope) in zip(self.queries, self.lengths, self.contexts, strict=True):
            for index in range(count):
                seen = length - count + index + 1
                scores = self.query[0][first] @ latent[:seen].T + self.query[1][first] @ rope[:seen].T
                rows.append((SCALE * scores).softmax(-1) @ latent[:seen])
                first += 1
        return torch.stack(rows)
