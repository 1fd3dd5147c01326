"""FlashInfer's paged MLA on a CPU: its plan for Hopper as in scheduler.cuh (0.7), and an execution that reads nothing
but the plan's buffers, as the kernel does."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

TILE = 64
"""Rows of a block (CTA_TILE_Q); two blocks of a cluster share what they read."""
CAPACITY = 16384
"""Pieces of work that a plan has room for."""
FIELDS = ("query_start", "page_start", "partial", "query_length", "length", "first_row", "from", "until", "work_starts")
PLACES = {"query_start": 2, "page_start": 3, "partial": 4, "query_length": 10, "length": 11, "first_row": 12} | {
    "from": 13,
    "until": 14,
    "work_starts": 15,
}
SPARE = tuple(range(5, 10))
"""Fields of the merge, which this execution finds by itself."""


@dataclass(frozen=True)
class Work:
    """A piece of work: rows of one request, and the part of its cache that they read."""

    query_start: int
    page_start: int
    partial: int
    query_length: int
    length: int
    first_row: int
    start: int
    until: int


def plan(
    workspace: Tensor, query_starts: Tensor, page_starts: Tensor, lengths: Tensor, num_heads: int, num_sms: int
) -> list[int]:
    """`MLAPlan` with causal: writes the plan into the workspace and returns its 18 numbers."""
    counts = (query_starts[1:] - query_starts[:-1]).tolist()
    cluster = 2 if sum(count * num_heads for count in counts) // len(counts) > TILE else 1
    clusters, rows = num_sms // cluster, cluster * TILE
    tiles = []
    for request, (count, length) in enumerate(zip(counts, lengths.tolist(), strict=True)):
        number = -(-count * num_heads // rows)
        for tile in reversed(range(number)):
            end = length if tile + 1 == number else _causal_end(count, length, tile, rows, num_heads)
            tiles.append((request, tile, end))
    limit = _limit(max(-(-sum(end for _, _, end in tiles) // clusters), 1))
    heap, works, partial = [(0, cluster_id) for cluster_id in range(clusters)], defaultdict(list), 0
    for request, tile, end in tiles:
        start, remaining, is_split = 0, end, end > limit
        size = min(rows, counts[request] * num_heads - tile * rows)
        while True:
            cost, cluster_id = heapq.heappop(heap)
            part = min(remaining, limit)
            heapq.heappush(heap, (cost + 2 * rows + part, cluster_id))
            starts = int(query_starts[request]), int(page_starts[request])
            place = partial if is_split else -1
            shape = counts[request], int(lengths[request]), tile * rows
            works[cluster_id].append(Work(*starts, place, *shape, start, start + part))
            partial, start, remaining = partial + size * is_split, start + part, remaining - part
            if remaining <= 0:
                break
    in_order = [work for cluster_id in range(clusters) for work in works[cluster_id]]
    ends = torch.tensor([0, *(len(works[cluster_id]) for cluster_id in range(clusters))]).cumsum(0)
    columns = {
        "query_start": [work.query_start for work in in_order],
        "page_start": [work.page_start for work in in_order],
        "partial": [work.partial for work in in_order],
        "query_length": [work.query_length for work in in_order],
        "length": [work.length for work in in_order],
        "first_row": [work.first_row for work in in_order],
        "from": [work.start for work in in_order],
        "until": [work.until for work in in_order],
        "work_starts": ends.tolist(),
    }
    info, offset = [0] * 18, 0
    info[0], info[1] = cluster, clusters
    for place in sorted([*PLACES.values(), *SPARE]):
        info[place] = offset
        offset += 4 * (num_sms if place in SPARE else CAPACITY)
    for name, values in columns.items():
        _field(workspace, info, name)[: len(values)] = torch.tensor(values, dtype=torch.int32)
    return info


def _causal_end(count: int, length: int, tile: int, rows: int, num_heads: int) -> int:
    return max(min(length - count - (-(tile + 1) * rows // num_heads), length), 0)


def _limit(tokens: int) -> int:
    for most, limit in ((8, 32), (16, 64), (32, 128), (64, 192)):
        if tokens <= most:
            return limit
    return -(-tokens // 256) * 256


def _field(workspace: Tensor, info: list[int], name: str) -> Tensor:
    return workspace.view(torch.int32)[info[PLACES[name]] // 4 :][:CAPACITY]


def run(
    workspace: Tensor,
    info: list[int],
    query: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    pages: Tensor,
    page_size: int,
    scale: float,
) -> Tensor:
    """query: [T, heads, latent], [T, heads, rope]; cache: [pages, page size, latent], [.., rope]. -> [T, heads, latent]

    Rows of no piece of work stay NaN."""
    cluster, clusters = info[:2]
    num_heads, rows = query[0].shape[1], cluster * TILE
    output = torch.full_like(query[0], float("nan"), dtype=torch.float32)
    parts: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    bounds = _field(workspace, info, "work_starts")[: clusters + 1].tolist()
    for index in range(bounds[-1]):
        work = Work(*(int(_field(workspace, info, name)[index]) for name in FIELDS[:-1]))
        packed = torch.arange(work.first_row, min(work.first_row + rows, work.query_length * num_heads))
        token, head = packed // num_heads, packed % num_heads
        positions = torch.arange(work.start, work.until)
        page = pages[work.page_start + positions // page_size].long()
        latent, rope = (part[page, positions % page_size].float() for part in cache)
        row = work.query_start + token
        scores = scale * (query[0][row, head].float() @ latent.T + query[1][row, head].float() @ rope.T)
        is_hidden = positions[None, :] + work.query_length > work.length + token[:, None]
        scores = scores.masked_fill(is_hidden, float("-inf"))
        lse = scores.logsumexp(-1)
        shares = (scores - lse[:, None]).exp().masked_fill(is_hidden | lse.isinf()[:, None], 0.0)
        parts[work.query_start, work.first_row].append((lse, shares @ latent))
        if work.partial < 0:
            assert len(parts[work.query_start, work.first_row]) == 1
    for (query_start, first_row), found in parts.items():
        lses = torch.stack([lse for lse, _ in found])
        weights = (lses - lses.logsumexp(0)).exp().nan_to_num(0.0)
        packed = torch.arange(first_row, first_row + lses.shape[1])
        merged = sum(weight[:, None] * value for weight, (_, value) in zip(weights, found, strict=True))
        output[query_start + packed // num_heads, packed % num_heads] = merged
    return output.to(query[0].dtype)


class Wrapper:
    """`flashinfer.mla.BatchMLAPagedAttentionWrapper`, as far as the backend uses it."""

    num_sms = 12

    def __init__(self, workspace: Tensor, **buffers: Any) -> None:
        self.buffers, self._planned_backend = buffers, SimpleNamespace()
        self._workspace = torch.full((1 << 20,), 0x7F, dtype=torch.uint8)

    def plan(self, *, metadata: Any, **settings: Any) -> None:
        starts, page_starts, pages, lengths = metadata
        reserved = [self.buffers[name] for name in ("qo_indptr", "kv_indptr", "kv_len_arr")]
        assert [buffer.shape for buffer in reserved] == [starts.shape, page_starts.shape, lengths.shape]
        assert torch.equal((lengths + settings["page_size"] - 1) // settings["page_size"], page_starts.diff())
        assert {part.dtype for part in metadata} == {torch.int32}
        assert settings["causal"]
        for buffer, given in zip(reserved, (starts, page_starts, lengths), strict=True):
            buffer.copy_(given)
        self.buffers["kv_indices"][: len(pages)] = pages
        info = plan(self._workspace, starts, page_starts, lengths, settings["num_heads"], self.num_sms)
        self.settings = settings
        self._planned_backend = SimpleNamespace(
            _plan_info=info, _int_workspace_buffer=self._workspace, _pin_memory_int_workspace_buffer=torch.empty(1)
        )

    def run(self, *, query: tuple[Tensor, Tensor], kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        planned, settings = self._planned_backend, self.settings
        return run(
            planned._int_workspace_buffer,
            planned._plan_info,
            query,
            kv_cache,
            self.buffers["kv_indices"],
            settings["page_size"],
            settings["sm_scale"],
        )


class MLAPlanMetadata:
    @staticmethod
    def csr(*parts: Tensor) -> tuple[Tensor, ...]:
        return parts
