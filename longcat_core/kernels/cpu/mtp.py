"""The MTP layer for few tokens, in this folder's kernels. Reference: an engine's own modules."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from longcat_core.kernels.cpu.experts import CompiledFFN
from longcat_core.kernels.cpu.half_layer import HalfLayer
from longcat_core.kernels.cpu.library import library, require_bf16, storages
from longcat_core.kernels.cpu.mla import Mla, ProjectionFields
from longcat_core.kernels.cpu.product import Projection
from longcat_core.layers.latent_attention import PagedBatch, RequestGroup


class Norms(NamedTuple):
    """Weights, bf16 [H] each."""

    embedded: Tensor
    hidden: Tensor
    attention: Tensor
    ffn: Tensor
    last: Tensor

    @classmethod
    def of(cls, layer: Any, last: Any) -> Norms:
        """layer: an engine's MTP layer, with modules named as published; last: the norm after it."""
        norms = layer.enorm["m"], layer.hnorm["m"], layer.input_layernorm, layer.post_attention_layernorm, last
        return cls(*(norm.weight for norm in norms))


class Vocabulary(NamedTuple):
    """Weights, bf16 [tokens, H] each, contiguous."""

    embedding: Tensor
    head: Tensor


class Chains(NamedTuple):
    tokens: Tensor
    """int64 [R, P + 1], of each request, with the one that was given."""
    logits: Tensor
    """bf16 [P, R, tokens of the head], which all but the first were chosen from: the first of the greatest."""


class _Mtp(ctypes.Structure):
    """`Mtp` of half_layer.cpp."""

    _fields_: ClassVar[Any] = [
        *((name, ctypes.c_void_p) for name in ("embedded_norm", "hidden_norm", "last_norm")),
        ("eh_proj", ProjectionFields),
        ("half", ctypes.c_void_p),
    ]


class MtpLayer:
    """`eh_proj([norm(embedding of the next token), norm(hidden)])`, an attention, a dense FFN and the last norm, of one
    rank that has all of it, in one call.

    Raises:
        ValueError: for dtypes or strides that the kernels do not take, or sizes that do not fit.
    """

    def __init__(self, norms: Norms, epsilon: float, eh_proj: Projection, mla: Mla, ffn: CompiledFFN) -> None:
        require_bf16(**norms._asdict())
        self._half = HalfLayer(norms.attention, mla, norms.ffn, ffn, epsilon)
        found = [*(len(norm) for norm in norms), *eh_proj.weight.shape]
        wanted = [*[mla.hidden] * len(norms), mla.hidden, 2 * mla.hidden]
        if found != wanted:
            raise ValueError(f"norms and eh_proj: {found}, wanted {wanted}")
        self._storages = storages(*norms, *eh_proj)
        self._fields = _Mtp(
            *(norm.data_ptr() for norm in (norms.embedded, norms.hidden, norms.last)),
            ProjectionFields.of("eh_proj", eh_proj),
            ctypes.addressof(self._half.fields),
        )

    def __call__(
        self,
        embedded: Tensor,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        slots: Tensor,
        batch: PagedBatch,
    ) -> Tensor | None:
        """embedded and hidden_states: bf16 [T, H]; the rest, and what is raised, as of `Mla`. Returns bf16 [T, H], the
        `hidden_states` of the next step; None where `Mla` returns it."""
        where = self._half.attention.where(embedded, cos, sin, cache, slots, batch)
        if where is None:
            return None
        require_bf16(hidden_states=hidden_states)
        if hidden_states.shape != embedded.shape:
            raise ValueError(f"hidden_states: {[*hidden_states.shape]}, wanted {[*embedded.shape]} as embedded has")
        output = embedded.new_empty(embedded.shape)
        library().longcat_mtp(
            ctypes.byref(self._fields),
            output.data_ptr(),
            embedded.data_ptr(),
            embedded.stride(0),
            hidden_states.data_ptr(),
            hidden_states.stride(0),
            *where.arguments(),
        )
        return output

    def chain(
        self,
        vocabulary: Vocabulary,
        tokens: Tensor,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        slots: Tensor,
        batch: PagedBatch,
        positions: Tensor,
    ) -> Chains | None:
        """P passes over one token of each of R requests, each with the token that the one before chose.

        tokens: integer [R], rows of the embedding, of the first pass; hidden_states: bf16 [R, H]; cos and sin: fp32
        [P, R, 1, rope / 2]; cache: as of `Mla`; slots and positions: integer [P, R]; batch: of the R requests in order,
        with equally many new tokens each, whose contexts are as long as any in the chain: no slot beyond a position is
        read. None where `Mla` returns it.

        Raises:
            ValueError: for other dtypes or sizes, or rows that are not contiguous.
        """
        passes, requests = positions.shape
        first = _first_pass(batch, positions)
        where = self._half.attention.where(hidden_states, cos[0], sin[0], cache, slots[0], first)
        if where is None:
            return None
        require_bf16(**vocabulary._asdict())
        embedding, head = vocabulary
        found = [[*each.shape] for each in (tokens, embedding, head, cos, sin, slots)]
        hidden, angles = self._half.attention.hidden, [passes, *where.cos.shape]
        weights = [len(embedding), hidden], [min(len(head), len(embedding)), hidden]
        wanted = [[requests], *weights, angles, angles, [passes, requests]]
        if found != wanted or not (embedding.is_contiguous() and head.is_contiguous()):
            raise ValueError(
                f"tokens, embedding, head, cos, sin, slots: {found}, wanted {wanted}, and contiguous weights"
            )
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < len(embedding):
            raise ValueError(f"tokens: {tokens.tolist()}, wanted rows of an embedding of {len(embedding)}")
        assert len(where.groups.cases) == len(first.groups), "positions of a group's later passes follow its first ones"
        chosen = torch.empty(passes + 1, requests, dtype=torch.int64)
        chosen[0] = tokens
        logits = hidden_states.new_empty(passes, requests, len(head))
        cos, sin, slots = cos.contiguous(), sin.contiguous(), slots.long().contiguous()
        library().longcat_chain(
            ctypes.byref(self._fields),
            chosen.data_ptr(),
            logits.data_ptr(),
            hidden_states.data_ptr(),
            hidden_states.stride(0),
            embedding.data_ptr(),
            head.data_ptr(),
            len(head),
            cos.data_ptr(),
            sin.data_ptr(),
            cache.data_ptr(),
            slots.data_ptr(),
            where.groups.array,
            len(where.groups.cases),
            requests,
            passes,
        )
        return Chains(chosen.T, logits)


def _first_pass(batch: PagedBatch, positions: Tensor) -> PagedBatch:
    """The batch of a chain's first pass. One table of slots is for all passes; positions of a group's requests in later
    ones are behind its own in memory.

    positions: integer [P, R].
    """
    groups = []
    for group in batch.groups:
        requests = group.queries[:, 0] // group.queries.shape[1]
        of_all = positions.long()[:, requests].contiguous()
        groups.append(RequestGroup(requests.unsqueeze(1), group.slots, of_all[0].unsqueeze(1), False, False))
    return PagedBatch(tuple(groups))
