"""A whole MLA of a decode step in one call: projections, norms, rotary embedding, the cache's write, attention.

Each of its operators is one of this folder's; alone, at a few tokens, calling them takes as long as what they do.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from longcat_core.kernels.cpu.attention import Group, GroupFields, groups_of, is_decoding
from longcat_core.kernels.cpu.library import GROUP, address_of, library, require_bf16, require_weight, storages
from longcat_core.kernels.cpu.product import FEW_ROWS, Projection
from longcat_core.layers.latent_attention import PagedBatch, UpProjection


class ProjectionFields(ctypes.Structure):
    """`Projection` of kernels.h."""

    _fields_: ClassVar[Any] = [
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_long),
        ("columns", ctypes.c_long),
    ]

    @classmethod
    def of(cls, name: str, projection: Projection) -> ProjectionFields:
        """They do not keep the tensors alive.

        Raises:
            ValueError: for dtypes or strides that the kernels do not take.
        """
        require_weight(name, *projection)
        if not projection.weight.is_contiguous():
            raise ValueError(f"{name}: strides {projection.weight.stride()}, wanted contiguous rows")
        return cls(projection.weight.data_ptr(), address_of(projection.scales), *projection.weight.shape)


class _Mla(ctypes.Structure):
    """`Mla` of kernels.h."""

    _fields_: ClassVar[Any] = [
        *((name, ProjectionFields) for name in ("qkv_a", "q_b", "o")),
        *((name, ctypes.c_void_p) for name in ("q_norm", "kv_norm", "w_uk", "w_uv")),
        ("epsilon", ctypes.c_float),
    ]


class TokensFields(ctypes.Structure):
    """`Tokens` of kernels.h."""

    _fields_: ClassVar[Any] = [
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "cache", "slots", "groups")),
        *((name, ctypes.c_long) for name in ("group_count", "count")),
        ("wanted", ctypes.c_void_p),
        ("wanted_count", ctypes.c_long),
    ]


class Mla:
    """One attention's weights. They are read where they are, so that what is loaded into them in place is seen.

    Raises:
        ValueError: for dtypes or strides that the kernels do not take, or sizes that do not fit.
        RuntimeError: if the library is not there.
    """

    def __init__(
        self,
        qkv_a: Projection,
        q_norm: Tensor,
        kv_norm: Tensor,
        q_b: Projection,
        up: UpProjection,
        o: Projection,
        epsilon: float,
        softmax_scale: float,
    ) -> None:
        """qkv_a: of queries and then latents and keys; q_norm: bf16 [q rank]; kv_norm: bf16 [latent]; up: bf16; o: back
        to the hidden size. Both MLA scales are in the norms."""
        heads, nope, latent = up.w_uk.shape
        rope = qkv_a.weight.shape[0] - len(q_norm) - latent
        found = [[*p.weight.shape] for p in (qkv_a, q_b, o)], len(kv_norm)
        hidden, values = o.weight.shape[0], heads * up.w_uv.shape[1]
        wanted = (
            [[len(q_norm) + latent + rope, hidden], [heads * (nope + rope), len(q_norm)], [hidden, values]],
            latent,
        )
        if found != wanted or rope < 2 or rope % 2 or latent % GROUP:
            raise ValueError(f"projections and the latents' norm {found}, wanted {wanted}, and a multiple of {GROUP}")
        w_uk, w_uv = up.w_uk.transpose(1, 2), up.w_uv
        require_bf16(q_norm=q_norm, kv_norm=kv_norm, w_uk=w_uk, w_uv=w_uv)
        if not w_uk.is_contiguous() or not w_uv.is_contiguous():
            raise ValueError("w_uk, w_uv: not contiguous, wanted as `UpProjection.of` lays them out")
        self._up, self._rope, self._scale, self.hidden = up, rope, softmax_scale, hidden
        self._storages = storages(*qkv_a, *q_b, *o, q_norm, kv_norm)
        self.fields = _Mla(
            *(ProjectionFields.of(*each) for each in {"qkv_a": qkv_a, "q_b": q_b, "o": o}.items()),
            *(tensor.data_ptr() for tensor in (q_norm, kv_norm, w_uk, w_uv)),
            epsilon,
        )

    def takes(self, tokens: int, cache: Tensor, batch: PagedBatch) -> bool:
        """Whether a call on so many tokens returns something, with a cache of this dtype."""
        return 0 < tokens <= FEW_ROWS and cache.dtype == torch.bfloat16 and is_decoding(batch, self._up)

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, new_slots: Tensor, batch: PagedBatch
    ) -> Tensor | None:
        """x: bf16 [T, H]; cos and sin: fp32 [T, 1, rope / 2]; cache: bf16 [S, latent + rope]; new_slots: int64 [T],
        where the tokens go. Returns bf16 [T, H], or None where others are quicker: for prompts, and many tokens.

        Raises:
            ValueError: for other dtypes or sizes, or rows that are not contiguous.
        """
        tokens = self.tokens(x, cos, sin, cache, new_slots, batch)
        if tokens is None:
            return None
        output = x.new_empty(len(x), self.hidden)
        library().longcat_mla(
            ctypes.byref(self.fields), output.data_ptr(), x.data_ptr(), x.stride(0), ctypes.byref(tokens.fields)
        )
        return output

    def tokens(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, new_slots: Tensor, batch: PagedBatch
    ) -> Tokens | None:
        """What the kernels are told of such a call's tokens; None, or raises, as the call."""
        if not self.takes(len(x), cache, batch):
            return None
        groups = [
            group for new in batch.requests for group in groups_of(batch, new, self._up, cache, self._rope, self._scale)
        ]
        self._require(x, cos, sin, cache, new_slots, batch.query_starts[-1])
        return Tokens.of(cos, sin, cache, new_slots, groups)

    def last_tokens(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        new_slots: Tensor,
        batch: PagedBatch,
        lengths: Tensor,
        wanted: Tensor | None = None,
    ) -> Tokens | None:
        """The same, where of each of R requests one token is attended from, with a context of its own length, at most
        the batch's. lengths: integer [R], or [P, R] for P passes, of which the others are those of the first; wanted:
        integer [R], these tokens; None if there are no others, of which x [R, H] then is.
        """
        if not self.takes(len(x), cache, batch):
            return None
        requests = range(len(batch.seq_lens))
        self._require(x, cos, sin, cache, new_slots, len(requests) if wanted is None else batch.query_starts[-1])
        if lengths.shape[-1] != len(requests) or (wanted is not None and len(wanted) != len(requests)):
            raise ValueError(f"lengths: {[*lengths.shape]}, wanted as many as the {len(requests)} requests")
        least, most = lengths.aminmax()
        if not 0 < int(least) <= int(most) <= max(batch.seq_lens):
            raise ValueError(f"lengths: {lengths.tolist()}, wanted from 1 up to the batch's {max(batch.seq_lens)}")
        lengths = lengths.long().contiguous()
        group = Group.of(batch, requests, self._up, cache, self._rope, self._scale, requests, lengths)
        return Tokens.of(cos, sin, cache, new_slots, [group], wanted)

    def _require(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, new_slots: Tensor, in_batch: int) -> None:
        """in_batch: new tokens of it."""
        require_bf16(x=x, cache=cache)
        tokens, width = len(x), self._up.w_uk.shape[2] + self._rope
        angles = tokens * self._rope // 2
        are_angles = all(each.dtype == torch.float32 and each.numel() == angles for each in (cos, sin))
        fits = x.shape[1] == self.hidden and cache.shape[1] == width and len(new_slots) == in_batch == tokens
        if not fits or not are_angles:
            raise ValueError(
                f"x {[*x.shape]}, cos {cos.dtype} {[*cos.shape]}, sin {sin.dtype} {[*sin.shape]}, cache "
                f"{[*cache.shape]}, {len(new_slots)} slots and a batch of {in_batch}, wanted [T, {self.hidden}], "
                f"torch.float32 [T, 1, {self._rope // 2}] twice, [S, {width}], T and T"
            )


class Tokens(NamedTuple):
    """New tokens, as the kernels take them."""

    fields: TokensFields
    outputs: int
    """Tokens whose outputs are computed."""
    kept: tuple[Any, ...]
    """What the fields point into."""

    @classmethod
    def of(
        cls,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        new_slots: Tensor,
        groups: Sequence[Group],
        wanted: Tensor | None = None,
    ) -> Tokens:
        tokens = len(new_slots)
        cos, sin, new_slots = cos.contiguous(), sin.contiguous(), new_slots.long().contiguous()
        wanted = None if wanted is None else wanted.long().contiguous()
        array = (GroupFields * len(groups))(*(group.fields for group in groups))
        count = tokens if wanted is None else len(wanted)
        pointers = (each.data_ptr() for each in (cos, sin, cache, new_slots))
        fields = TokensFields(*pointers, ctypes.addressof(array), len(groups), tokens, address_of(wanted), count)
        return cls(fields, count, (cos, sin, cache, new_slots, groups, array, wanted))
