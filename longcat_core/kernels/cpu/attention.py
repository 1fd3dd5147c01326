"""MLA over a paged latent cache in bf16, with scores and sums in fp32. Reference: `layers.latent_attention`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_core.kernels.cpu.library import GROUP, is_available, library, multiplies_bf16, padded
from longcat_core.kernels.cpu.product import product
from longcat_core.layers import latent_attention
from longcat_core.layers.latent_attention import FEW_TOKENS, PagedBatch, RequestGroup, UpProjection

_TOKENS_AT_ONCE = 64
"""New tokens of a call, which bounds the memory that it takes."""


class _Attention(ctypes.Structure):
    """`Attention` of attention.cpp."""

    _fields_ = [  # as ctypes wants it
        *((name, ctypes.c_long) for name in ("requests", "queries", "heads", "nope", "rope", "latent", "value")),
        *((name, ctypes.c_long) for name in ("slots", "cache_stride", "query_stride")),
        ("scale", ctypes.c_float),
    ]


def paged_attention(
    queries: Tensor, cache: Tensor, batch: PagedBatch, up: UpProjection, softmax_scale: float
) -> Tensor:
    """As the reference: decoding and verification by the compiled kernel, where it is there and takes dtypes and sizes,
    the rest by torch."""
    if not _takes(queries, cache, up):
        return latent_attention.paged_attention(queries, cache, batch, up, softmax_scale)
    linear = F.linear if multiplies_bf16() else product
    output = queries.new_empty(queries.shape[0], queries.shape[1], up.w_uv.shape[1])
    for group in batch.groups:
        if group.queries.shape[1] > FEW_TOKENS or latent_attention.is_prefill(group, up):
            latent_attention.attend(output, queries, cache, group, up, softmax_scale, linear)
        else:
            at_once = max(1, _TOKENS_AT_ONCE // group.queries.shape[1])
            for first in range(0, len(group.queries), at_once):
                _attend(output, queries, cache, group, slice(first, first + at_once), up, softmax_scale)
    return output


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


def _takes(queries: Tensor, cache: Tensor, up: UpProjection) -> bool:
    dtypes = {queries.dtype, cache.dtype, up.w_uk.dtype, up.w_uv.dtype}
    return is_available() and dtypes == {torch.bfloat16} and up.w_uk.shape[2] % GROUP == 0


def _attend(
    output: Tensor, queries: Tensor, cache: Tensor, group: RequestGroup, some: slice, up: UpProjection, scale: float
) -> None:
    """Some requests of a group."""
    rows, slots, positions = group.queries[some], group.slots[some], group.positions[some]
    heads, nope, latent = up.w_uk.shape
    w_uk, w_uv, queries = up.w_uk.transpose(1, 2).contiguous(), up.w_uv.contiguous(), queries.contiguous()
    visible = None if group.trees is None else group.visible()[some].contiguous()
    width = queries.shape[-1]
    case = _Attention(
        *rows.shape,
        heads,
        nope,
        width - nope,
        latent,
        w_uv.shape[1],
        slots.shape[1],
        cache.stride(0),
        heads * width,
        scale,
    )
    parts = library().longcat_attention_parts(ctypes.byref(case))
    each = padded(cache.shape[1]) + parts * (latent + 2) + padded(nope)
    scratch = torch.empty(rows.numel() * heads * each, dtype=torch.float32)
    library().longcat_attention(
        ctypes.byref(case),
        output.data_ptr(),
        queries.data_ptr(),
        rows.data_ptr(),
        cache.data_ptr(),
        slots.data_ptr(),
        positions.data_ptr(),
        None if visible is None else visible.data_ptr(),
        w_uk.data_ptr(),
        w_uv.data_ptr(),
        scratch.data_ptr(),
    )
