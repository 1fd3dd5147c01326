"""Attention of prompts in bf16, with scores and sums in fp32. Reference: `latent_attention.attend_to_expanded`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from longcat_core.kernels.cpu.library import library
from longcat_core.layers import latent_attention
from longcat_core.layers.latent_attention import RequestGroup


class Prompt(ctypes.Structure):
    """`Prompt` of kernels.h."""

    _fields_ = [  # as ctypes wants it
        *((name, ctypes.c_long) for name in ("queries", "slots", "heads", "nope", "rope", "value")),
        *((name, ctypes.c_long) for name in ("query_stride", "rope_stride", "output_stride")),
        ("scale", ctypes.c_float),
    ]


def attend_to_expanded(
    queries: Tensor, expanded: Tensor, rope_keys: Tensor, group: RequestGroup, scale: float
) -> Tensor:
    """As the reference: one request in bf16 by the compiled kernel, where this processor has products in bf16, the rest
    by torch."""
    (requests, new, heads, width), (slots, rope) = queries.shape, rope_keys.shape[1:]
    value = expanded.shape[-1] - (width - rope)
    prompt = Prompt(
        new, slots, heads, width - rope, rope, value, heads * width, rope_keys.stride(1), heads * value, scale
    )
    scratch_words: int = library().longcat_prompt_scratch(ctypes.byref(prompt))
    is_bf16 = queries.dtype == expanded.dtype == rope_keys.dtype == torch.bfloat16 and rope_keys.stride(-1) == 1
    if requests > 1 or group.trees is not None or not is_bf16 or not scratch_words:
        return latent_attention.attend_to_expanded(queries, expanded, rope_keys, group, scale)
    queries, expanded = queries.contiguous(), expanded.contiguous()
    output = queries.new_empty(requests, new, heads, value)
    scratch = torch.empty(scratch_words, dtype=torch.int32)
    library().longcat_prompt(
        ctypes.byref(prompt),
        output.data_ptr(),
        queries.data_ptr(),
        expanded.data_ptr(),
        rope_keys.data_ptr(),
        scratch.data_ptr(),
    )
    return output
