"""MLA over a paged latent cache in plain torch: prefill, chunks of it, decode and verification are one function."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_TOKENS = 16
"""Requests with this many new tokens or fewer are attended to in one batch: decoding, and verification of drafts."""

# Bounds on temporaries: in a prefill, (query, key) pairs of a head's mask, and pairs of a head and a slot of which key
# and value are expanded; in latent space, scores of all heads, and slots of a batch that are gathered from the cache,
# in fp32: few enough to stay in a processor's cache.
_PAIRS_AT_ONCE = 1 << 22
_EXPANDED_AT_ONCE = 1 << 17
_SCORES_AT_ONCE = 1 << 22
_SLOTS_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class UpProjection:
    """`kv_b_proj`, which makes keys and values of latents: whole for prompts, in two halves for what is attended to in
    latent space."""

    whole: Tensor
    """[heads (nope + v), L], as published."""
    w_uk: Tensor
    """[heads, nope, L]"""
    w_uv: Tensor
    """[heads, v, L]"""

    @classmethod
    def of(cls, weight: Tensor, heads: int, nope: int) -> UpProjection:
        """weight: as published. The halves are copied once, each with the dimension last that products sum over: over
        another, a product copies its weight first, or reads it much slower."""
        parts = weight.unflatten(0, (heads, -1))
        w_uk, w_uv = parts.split([nope, parts.shape[1] - nope], dim=1)
        return cls(weight, w_uk.transpose(1, 2).contiguous().transpose(1, 2), w_uv.contiguous())


@dataclass(frozen=True)
class RequestGroup:
    """Requests with equally many new tokens and contexts of like length, attended to in one batch."""

    queries: Tensor
    """int64 [G, Q]: rows of the query tensor, the new tokens of each request in order."""
    slots: Tensor
    """int64 [G, N]: cache slots of each request's tokens, padded to the longest with the request's own first
    slot: an uninitialised slot may hold NaN, which a weight of 0 does not remove."""
    positions: Tensor
    """int64 [G, Q]: position of each query among the slots. It sees slots up to its own, so never the padding."""
    is_whole_prompt: bool
    """One request whose N tokens are all new, so that the mask is the plain causal triangle."""
    is_all_visible: bool
    """One query a request, and no padding, so that there is no mask."""
    trees: Tensor | None = None
    """bool [G, Q, Q]: which of the new tokens each query sees, where those are not all up to its own."""

    def visible(self, first: int = 0, last: int | None = None) -> Tensor:
        """bool [G, last - first, N]: whether the query sees the slot."""
        slots = torch.arange(self.slots.shape[1])
        if self.trees is None:
            return slots <= self.positions[:, first:last, None]
        before = (slots < self.positions[:, :1]).unsqueeze(1).repeat(1, self.positions.shape[1], 1)
        return before.scatter(2, self.positions.unsqueeze(1).expand_as(self.trees), self.trees)[:, first:last]


@dataclass(frozen=True, eq=False)
class PagedBatch:
    """Where the tokens of one engine step are in the cache; built once a step, used by every layer.

    Only for the step that it was built for: the table is read when a layer attends, and the engine writes the next
    step's blocks into it. Groups, which torch alone needs, are made when they are first asked for.
    """

    query_starts: Sequence[int]
    """R + 1 offsets into the query tensor."""
    seq_lens: Sequence[int]
    """R context lengths, new tokens included."""
    block_table: Tensor
    """Integer [rows, blocks]: the cache blocks of one request in each row, of which only those with its tokens are
    read."""
    block_size: int
    """Tokens a block."""
    trees: Tensor | None = None
    """bool [R, Q, Q], where all requests have Q new tokens that are nodes of a tree: a node sees itself and those
    before it on its path."""
    table_rows: Sequence[int] | None = None
    """The R rows of the table to use, if not the first ones in order."""
    requests: dict[int, list[int]] = field(default_factory=dict, init=False)
    """Those that have new tokens, by their number."""
    _groups: dict[int, tuple[RequestGroup, ...]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: if a request has more new tokens than its context is long.
        """
        for request, length in enumerate(self.seq_lens):
            new = self.new_tokens(request)
            if new > length:
                raise ValueError(f"request {request}: {new} new tokens, wanted at most its length {length}")
            if new:
                self.requests.setdefault(new, []).append(request)

    def new_tokens(self, request: int) -> int:
        return self.query_starts[request + 1] - self.query_starts[request]

    @property
    def groups(self) -> tuple[RequestGroup, ...]:
        return tuple(group for new in self.requests for group in self.groups_of(new))

    def groups_of(self, new: int) -> tuple[RequestGroup, ...]:
        """Of the requests with so many new tokens; made once."""
        if new in self._groups:
            return self._groups[new]
        buckets: dict[int, list[int]] = {}
        for request in self.requests[new]:
            # Contexts in a bucket differ by less than two times, which bounds the padding; a prompt chunk is
            # large enough to go alone.
            key = self.seq_lens[request].bit_length() if new <= FEW_TOKENS else -1 - request
            buckets.setdefault(key, []).append(request)
        self._groups[new] = tuple(self._group(new, bucket) for bucket in buckets.values())
        return self._groups[new]

    def rows_of(self, requests: Sequence[int]) -> Sequence[int]:
        """Of the table."""
        return requests if self.table_rows is None else [self.table_rows[request] for request in requests]

    def _group(self, new: int, bucket: Sequence[int]) -> RequestGroup:
        longest = max(self.seq_lens[request] for request in bucket)
        lengths = torch.tensor([self.seq_lens[request] for request in bucket]).unsqueeze(1)
        starts = torch.tensor([self.query_starts[request] for request in bucket]).unsqueeze(1)
        positions = torch.arange(longest)
        rows = torch.tensor(self.rows_of(bucket))
        # Cut first: an engine's table is as wide as the longest context that there may be.
        blocks = self.block_table[:, : (longest - 1) // self.block_size + 1][rows].long()
        slots = blocks[:, positions // self.block_size] * self.block_size + positions % self.block_size
        return RequestGroup(
            queries=starts + torch.arange(new),
            slots=torch.where(positions < lengths, slots, slots[:, :1]),
            positions=lengths - new + torch.arange(new),
            trees=None if self.trees is None else self.trees[torch.tensor(bucket)],
            is_whole_prompt=len(bucket) == 1 and new == longest and self.trees is None,
            is_all_visible=new == 1 and all(self.seq_lens[request] == longest for request in bucket),
        )


def write_latents(cache: Tensor, latents: Tensor, rope_keys: Tensor, slots: Tensor) -> None:
    """Store new tokens: latents [T, L] and rope_keys [T, R] into cache [S, L + R] at slots [T]; -1 stores nothing."""
    kept = slots >= 0
    rows = torch.cat((latents, rope_keys), dim=-1).to(cache.dtype)
    cache[slots[kept]] = rows[kept]


def paged_attention(
    queries: Tensor, cache: Tensor, batch: PagedBatch, up: UpProjection, softmax_scale: float
) -> Tensor:
    """Causal attention of new tokens over their requests' cached latents.

    queries: [T, heads, nope + rope], scaled and rotated; cache: [S, L + rope], new tokens already written. Any sizes.
    Returns [T, heads, v] in the queries' dtype; scores and softmax are fp32.
    """
    output = queries.new_empty(queries.shape[0], queries.shape[1], up.w_uv.shape[1])
    for group in batch.groups:
        attend(output, queries, cache, group, up, softmax_scale)
    return output


def attend(
    output: Tensor,
    queries: Tensor,
    cache: Tensor,
    group: RequestGroup,
    up: UpProjection,
    scale: float,
    linear: Callable[[Tensor, Tensor], Tensor] = F.linear,
    attend_to: Callable[[Tensor, Tensor, Tensor, RequestGroup, float], Tensor] | None = None,
) -> None:
    """`paged_attention` of one group: writes its rows of output [T, heads, v]. linear: expands latents of a prompt;
    attend_to: attends to what they become, in place of `attend_to_expanded`."""
    new = queries[group.queries]  # [G, Q, heads, nope + rope]
    if is_prefill(group.queries.shape[1], up):
        attended = _attend_expanded(new, cache, group, up, scale, linear, attend_to or attend_to_expanded)
    else:
        attended = _attend_absorbed(new, cache, group, up, scale)
    output[group.queries] = attended.to(output.dtype)


def is_prefill(new: int, up: UpProjection) -> bool:
    """Whether, for so many new tokens, expanding the latents into keys and values costs less than attending in latent
    space.

    With Q queries on N keys, a head multiplies N L (nope + v) to expand and then Q N (nope + v) to attend; in
    latent space it is Q N 2 L (the rope part is common to both).
    """
    latent, expanded = up.w_uk.shape[2], up.w_uk.shape[1] + up.w_uv.shape[1]
    return latent * expanded + new * expanded < new * 2 * latent


def _attend_absorbed(queries: Tensor, cache: Tensor, group: RequestGroup, up: UpProjection, scale: float) -> Tensor:
    """Attention over latents: `w_uk` goes into the query, `w_uv` onto the result. Returns [G, Q, heads, v]."""
    nope, latent = up.w_uk.shape[1:]
    q_nope, q_rope = queries.split([nope, queries.shape[-1] - nope], dim=-1)
    q_latent = torch.einsum("gqhp,hpl->gqhl", q_nope, up.w_uk)
    whole = torch.cat((q_latent, q_rope), dim=-1).float()
    slots_at_once = max(1, _SLOTS_AT_ONCE // len(group.slots))
    if group.slots.shape[1] <= slots_at_once:
        context = _attend_at_once(whole, cache, group, latent, scale)
    else:
        context = _attend_in_blocks(whole, cache, group, latent, scale, slots_at_once)
    return torch.einsum("gqhl,hvl->gqhv", context.to(up.w_uv.dtype), up.w_uv)


def _attend_at_once(queries: Tensor, cache: Tensor, group: RequestGroup, latent: int, scale: float) -> Tensor:
    """queries: fp32 [G, Q, heads, L + rope]. Returns fp32 [G, Q, heads, L]."""
    keys = cache[group.slots].float()
    context = queries.new_empty(*queries.shape[:3], latent)  # at once: small ones would keep an allocator's memory
    step = max(1, _SCORES_AT_ONCE // (queries.shape[2] * group.slots.numel()))
    for first in range(0, queries.shape[1], step):
        scores = _scores(queries, keys, group, scale, slice(first, first + step), slice(None))
        attended = scores.softmax(dim=-1) @ keys[..., :latent]
        context[:, first : first + step] = attended.unflatten(1, (-1, queries.shape[2]))
    return context


def _attend_in_blocks(
    queries: Tensor, cache: Tensor, group: RequestGroup, latent: int, scale: float, slots_at_once: int
) -> Tensor:
    """As `_attend_at_once`, one block of slots after the other, so that temporaries do not grow with the context: of
    the softmax there are the greatest score so far, and sums of exponentials of the differences to it."""
    count, new, heads = queries.shape[:3]
    greatest = queries.new_full((count, new * heads, 1), float("-inf"))
    total = queries.new_zeros(count, new * heads, 1)
    context = queries.new_zeros(count, new * heads, latent)
    step = max(1, _SCORES_AT_ONCE // (heads * count * slots_at_once))
    for start in range(0, group.slots.shape[1], slots_at_once):
        block = slice(start, start + slots_at_once)
        keys = cache[group.slots[:, block]].float()
        for first in range(0, new, step):
            rows = slice(first * heads, (first + step) * heads)
            scores = _scores(queries, keys, group, scale, slice(first, first + step), block)
            before = greatest[:, rows]
            # Finite from the first block on, as every query sees the first slot.
            now = torch.maximum(before, scores.amax(dim=-1, keepdim=True))
            weights, kept = scores.sub_(now).exp_(), (before - now).exp_()
            total[:, rows] = total[:, rows] * kept + weights.sum(dim=-1, keepdim=True)
            context[:, rows] = (context[:, rows] * kept).baddbmm_(weights, keys[..., :latent])
            greatest[:, rows] = now
    return context.div_(total).unflatten(1, (new, heads))


def _scores(queries: Tensor, keys: Tensor, group: RequestGroup, scale: float, new: slice, slots: slice) -> Tensor:
    """Of some queries, on the keys of some slots: fp32 [G, Q heads, slots], -inf where a slot is not seen."""
    scores = queries[:, new].flatten(1, 2) @ keys.transpose(1, 2) * scale
    if not group.is_all_visible:
        visible = group.visible(new.start, new.stop)[..., slots].repeat_interleave(queries.shape[2], dim=1)
        scores.masked_fill_(~visible, float("-inf"))
    return scores


def _attend_expanded(
    queries: Tensor,
    cache: Tensor,
    group: RequestGroup,
    up: UpProjection,
    scale: float,
    linear: Callable[[Tensor, Tensor], Tensor],
    attend_to: Callable[[Tensor, Tensor, Tensor, RequestGroup, float], Tensor],
) -> Tensor:
    """Attention over keys and values expanded from the latents, some heads at a time. Returns [G, Q, heads, v]."""
    heads, _, latent = up.w_uk.shape
    rows = cache[group.slots]
    latents, rope_keys = rows.split([latent, rows.shape[-1] - latent], dim=-1)
    whole = up.whole.to(rows.dtype).unflatten(0, (heads, -1))
    attended = queries.new_empty(*queries.shape[:3], up.w_uv.shape[1])
    step = max(1, _EXPANDED_AT_ONCE // group.slots.numel())
    for some in (slice(first, first + step) for first in range(0, heads, step)):
        weight = whole[some]
        expanded = linear(latents, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])
        attended[:, :, some] = attend_to(queries[:, :, some].to(rows.dtype), expanded, rope_keys, group, scale)
    return attended


def attend_to_expanded(
    queries: Tensor, expanded: Tensor, rope_keys: Tensor, group: RequestGroup, scale: float
) -> Tensor:
    """queries: [G, Q, heads, nope + rope]; expanded: [G, N, heads, nope + v]; rope_keys: [G, N, rope], of all heads.
    Returns [G, Q, heads, v]."""
    nope = queries.shape[-1] - rope_keys.shape[-1]
    k_nope, values = expanded.transpose(1, 2).split([nope, expanded.shape[-1] - nope], dim=-1)
    keys = torch.cat((k_nope, rope_keys.unsqueeze(1).expand(-1, k_nope.shape[1], -1, -1)), dim=-1)
    # torch's fused CPU kernel wants values as wide as keys; zero columns are dropped again below.
    width = max(keys.shape[-1], values.shape[-1])
    q, k, v = (F.pad(t, (0, width - t.shape[-1])) for t in (queries.transpose(1, 2), keys, values))
    if group.is_whole_prompt:
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        attended = torch.empty_like(q)
        step = max(1, _PAIRS_AT_ONCE // k.shape[2])
        for first in range(0, q.shape[2], step):
            mask = group.visible(first, first + step).unsqueeze(1)
            part = q[:, :, first : first + step]
            attended[:, :, first : first + step] = F.scaled_dot_product_attention(
                part, k, v, attn_mask=mask, scale=scale
            )
    return attended[..., : values.shape[-1]].transpose(1, 2)
