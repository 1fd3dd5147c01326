"""The MTP layer for few tokens, in this folder's kernels. Reference: an engine's own modules."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

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


def passes_of_chain(batch: PagedBatch, positions: Tensor) -> Iterator[PagedBatch]:
    """Of a chain of drafts, one token of each request in each pass, with one table of slots for all. For kernels of
    this folder alone, as they read no slot beyond a position.

    batch: of R requests with Q new tokens each, in order, whose contexts are as long as any in the chain; positions:
    int64 [steps, R].
    """
    rows = [group.queries[:, :1] // group.queries.shape[1] for group in batch.groups]
    for each in positions:
        groups = zip(batch.groups, rows, strict=True)
        yield PagedBatch(tuple(RequestGroup(of, group.slots, each[of], False, False) for group, of in groups))
