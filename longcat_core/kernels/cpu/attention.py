"""MLA over a paged latent cache in bf16, with scores and sums in fp32. Reference: `layers.latent_attention`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_core.kernels.cpu.library import GROUP, address_of, is_available, library, multiplies_bf16
from longcat_core.kernels.cpu.product import product
from longcat_core.kernels.cpu.prompt import attend_to_expanded
from longcat_core.layers import latent_attention
from longcat_core.layers.latent_attention import FEW_TOKENS, PagedBatch, RequestGroup, UpProjection

_TOKENS_AT_ONCE = 64
"""New tokens of a call, which bounds the memory that it takes."""


class Sizes(ctypes.Structure):
    """`Attention` of kernels.h."""

    _fields_ = [  # as ctypes wants it
        *((name, ctypes.c_long) for name in ("requests", "queries", "heads", "nope", "rope", "latent", "value")),
        *((name, ctypes.c_long) for name in ("slots", "cache_stride", "query_stride")),
        ("scale", ctypes.c_float),
    ]


class Case(NamedTuple):
    """Some requests of a group, as the kernel takes them."""

    sizes: Sizes
    rows: Tensor
    slots: Tensor
    positions: Tensor
    visible: Tensor | None

    @classmethod
    def of(cls, group: RequestGroup, some: slice, up: UpProjection, cache: Tensor, rope: int, scale: float) -> Case:
        rows, slots = group.queries[some], group.slots[some]
        heads, nope, latent = up.w_uk.shape
        sizes = Sizes(
            *rows.shape,
            heads,
            nope,
            rope,
            latent,
            up.w_uv.shape[1],
            slots.shape[1],
            cache.stride(0),
            heads * (nope + rope),
            scale,
        )
        visible = None if group.trees is None else group.visible()[some].contiguous()
        return cls(sizes, rows, slots, group.positions[some], visible)


def decoding(batch: PagedBatch, up: UpProjection, cache: Tensor, rope: int, scale: float) -> list[Case] | None:
    """A batch that the kernel takes as a whole: None if there is nothing in it, or a prompt, which torch is for."""
    cases = []
    for group in batch.groups:
        if _is_for_torch(group, up):
            return None
        cases += [Case.of(group, some, up, cache, rope, scale) for some in _at_once(group)]
    return cases or None


def paged_attention(
    queries: Tensor, cache: Tensor, batch: PagedBatch, up: UpProjection, softmax_scale: float
) -> Tensor:
    """As the reference: decoding and verification by the compiled kernel, where it is there and takes dtypes and sizes,
    the rest by torch."""
    if queries.dtype != torch.bfloat16 or cache.dtype != torch.bfloat16 or not takes(up):
        return latent_attention.paged_attention(queries, cache, batch, up, softmax_scale)
    linear = F.linear if multiplies_bf16() else product
    output = queries.new_empty(queries.shape[0], queries.shape[1], up.w_uv.shape[1])
    for group in batch.groups:
        if _is_for_torch(group, up):
            latent_attention.attend(output, queries, cache, group, up, softmax_scale, linear, attend_to_expanded)
        else:
            for some in _at_once(group):
                _attend(output, queries, cache, group, some, up, softmax_scale)
    return output


def _is_for_torch(group: RequestGroup, up: UpProjection) -> bool:
    return group.queries.shape[1] > FEW_TOKENS or latent_attention.is_prefill(group, up)


def _at_once(group: RequestGroup) -> Iterator[slice]:
    """The requests of a group, a call's worth at a time."""
    step = max(1, _TOKENS_AT_ONCE // group.queries.shape[1])
    return (slice(first, first + step) for first in range(0, len(group.queries), step))


def write_latents(cache: Tensor, latents: Tensor, rope_keys: Tensor, slots: Tensor) -> None:
    """As the reference, by the compiled kernel where it is there and takes dtypes and strides.

    Raises:
        ValueError: if there are not as many slots as latents and keys.
    """
    if not len(slots) == len(latents) == len(rope_keys):
        raise ValueError(f"{len(latents)} latents and {len(rope_keys)} keys for {len(slots)} slots, wanted as many")
    tensors = (cache, latents, rope_keys)
    if not is_available() or any(t.dtype != torch.bfloat16 or t.stride(-1) != 1 for t in tensors):
        latent_attention.write_latents(cache, latents, rope_keys, slots)
        return
    slots = slots.long().contiguous()
    library().longcat_write_latents(
        cache.data_ptr(),
        cache.stride(0),
        latents.data_ptr(),
        latents.stride(0),
        rope_keys.data_ptr(),
        rope_keys.stride(0),
        slots.data_ptr(),
        len(slots),
        latents.shape[1],
        rope_keys.shape[1],
    )


def takes(up: UpProjection) -> bool:
    """Whether the kernel is there, and takes queries and a cache in bf16 with these weights."""
    return is_available() and up.w_uk.dtype == up.w_uv.dtype == torch.bfloat16 and up.w_uk.shape[2] % GROUP == 0


def _attend(
    output: Tensor, queries: Tensor, cache: Tensor, group: RequestGroup, some: slice, up: UpProjection, scale: float
) -> None:
    """Some requests of a group."""
    w_uk, w_uv, queries = up.w_uk.transpose(1, 2).contiguous(), up.w_uv.contiguous(), queries.contiguous()
    case = Case.of(group, some, up, cache, queries.shape[-1] - up.w_uk.shape[1], scale)
    scratch = torch.empty(library().longcat_attention_scratch(ctypes.byref(case.sizes)), dtype=torch.float32)
    library().longcat_attention(
        ctypes.byref(case.sizes),
        output.data_ptr(),
        queries.data_ptr(),
        case.rows.data_ptr(),
        cache.data_ptr(),
        case.slots.data_ptr(),
        case.positions.data_ptr(),
        address_of(case.visible),
        w_uk.data_ptr(),
        w_uv.data_ptr(),
        scratch.data_ptr(),
    )
