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
from longcat_core.layers.latent_attention import PagedBatch


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


class Drafts(NamedTuple):
    tokens: Tensor
    """int64 [R], of each request: the first of the greatest logits, in bf16."""
    hidden_states: Tensor
    """bf16 [R, H], which they were chosen from: the `hidden_states` of the next step."""


class Chains(NamedTuple):
    tokens: Tensor
    """int64 [R, P + 1], of each request, with the one that was given."""
    hidden_states: Tensor
    """bf16 [P, R, H], which all but the first were chosen from, as of `Drafts`."""


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
        tokens = self._half.attention.tokens(embedded, cos, sin, cache, slots, batch)
        if tokens is None:
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
            ctypes.byref(tokens.fields),
        )
        return output

    def draft(
        self,
        vocabulary: Vocabulary,
        tokens: Tensor,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        slots: Tensor,
        batch: PagedBatch,
        wanted: Tensor,
        lengths: Tensor,
    ) -> Drafts | None:
        """A pass over the new tokens of R requests, and a draft after one of each; of others only the cache is written.

        tokens: integer [T], rows of the embedding; hidden_states, cos, sin, cache, slots and batch: as of a call;
        wanted: integer [R], of each request the token that is drafted after; lengths: integer [R], of the context up to
        it. None where `Mla` returns it.

        Raises:
            ValueError: for other dtypes or sizes, or rows that are not contiguous.
        """
        of_attention = self._half.attention.last_tokens(hidden_states, cos, sin, cache, slots, batch, lengths, wanted)
        if of_attention is None:
            return None
        self._require(vocabulary, tokens, len(hidden_states))
        if not 0 <= int(wanted.min()) <= int(wanted.max()) < len(tokens):
            raise ValueError(f"wanted: {wanted.tolist()}, of {len(tokens)} tokens")
        tokens = tokens.long().contiguous()
        output = hidden_states.new_empty(of_attention.outputs, hidden_states.shape[1])
        drafts = torch.empty(of_attention.outputs, dtype=torch.int64)
        library().longcat_draft(
            ctypes.byref(self._fields),
            drafts.data_ptr(),
            output.data_ptr(),
            tokens.data_ptr(),
            hidden_states.data_ptr(),
            hidden_states.stride(0),
            *(weight.data_ptr() for weight in vocabulary),
            len(vocabulary.head),
            ctypes.byref(of_attention.fields),
        )
        return Drafts(drafts, output)

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
        whose contexts are as long as any in the chain: no slot beyond a position is read. None where `Mla` returns it.

        Raises:
            ValueError: for other dtypes or sizes, or rows that are not contiguous.
        """
        passes, requests = positions.shape
        found = [[*each.shape] for each in (cos, sin, slots)]
        if any(shape[:2] != [passes, requests] for shape in found):
            raise ValueError(f"cos, sin, slots: {found}, wanted those of {passes} passes over {requests} tokens")
        cos, sin, slots = cos.contiguous(), sin.contiguous(), slots.long().contiguous()
        of_attention = self._half.attention.last_tokens(
            hidden_states, cos[0], sin[0], cache, slots[0], batch, positions + 1
        )
        if of_attention is None:
            return None
        self._require(vocabulary, tokens, requests)
        chosen = torch.empty(passes + 1, requests, dtype=torch.int64)
        chosen[0] = tokens
        outputs = hidden_states.new_empty(passes, *hidden_states.shape)
        library().longcat_chain(
            ctypes.byref(self._fields),
            chosen.data_ptr(),
            outputs.data_ptr(),
            hidden_states.data_ptr(),
            hidden_states.stride(0),
            *(weight.data_ptr() for weight in vocabulary),
            len(vocabulary.head),
            ctypes.byref(of_attention.fields),
            passes,
        )
        return Chains(chosen.T, outputs)

    def _require(self, vocabulary: Vocabulary, tokens: Tensor, count: int) -> None:
        """count: tokens there are to be."""
        require_bf16(**vocabulary._asdict())
        embedding, head = vocabulary
        found = [[*each.shape] for each in (tokens, embedding, head)]
        hidden = self._half.attention.hidden
        wanted = [[count], [len(embedding), hidden], [min(len(head), len(embedding)), hidden]]
        if found != wanted or not (embedding.is_contiguous() and head.is_contiguous()):
            raise ValueError(f"tokens, embedding, head: {found}, wanted {wanted}, and contiguous weights")
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < len(embedding):
            raise ValueError(f"tokens: {tokens.tolist()}, wanted rows of an embedding of {len(embedding)}")
