"""Router logits in nearly fp32 on the tensor cores of NVIDIA GPUs. Reference: `x.float() @ weight.float().T`.

A number in fp32 is the sum of two in bf16 to within 2^-17 of it. Of the four products of such sums the smallest is left
out. What is left out and rounded is about 2^-16 of each term, where products in bf16 alone have 2^-8 and fp32 2^-24.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS, _DEPTH = 64, 32, 64


class SplitWeight(NamedTuple):
    """A weight as the sum of two in bf16, [experts, H] each, contiguous."""

    high: Tensor
    low: Tensor


def split(weight: Tensor) -> SplitWeight:
    """Of an fp32 weight, once when it is loaded: high + low differs from it by at most 2^-17 of each number."""
    high = weight.bfloat16().contiguous()
    return SplitWeight(high, (weight.float() - high.float()).bfloat16())


@triton.jit
def router_product_kernel(
    hidden_states: tl.tensor,
    weight_high: tl.tensor,
    weight_low: tl.tensor,
    logits: tl.tensor,
    tokens: tl.tensor,
    experts: tl.tensor,
    hidden_size: tl.tensor,
    is_split: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_depth: tl.constexpr,
) -> None:
    """Some experts of a few tokens a program; `is_split`: x is in fp32, and has a low part as well."""
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    columns = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
    x_rows = hidden_states + rows.to(tl.int64)[:, None] * hidden_size
    places = columns[:, None] * hidden_size
    total = tl.zeros([block_rows, block_columns], dtype=tl.float32)
    small = tl.zeros([block_rows, block_columns], dtype=tl.float32)
    for start in range(0, hidden_size, block_depth):
        depths = start + tl.arange(0, block_depth)[None, :]
        is_depth = depths < hidden_size
        x = tl.load(x_rows + depths, mask=(rows < tokens)[:, None] & is_depth, other=0.0)
        is_weight = (columns < experts)[:, None] & is_depth
        high = tl.trans(tl.load(weight_high + places + depths, mask=is_weight, other=0.0))
        low = tl.trans(tl.load(weight_low + places + depths, mask=is_weight, other=0.0))
        x_high = x.to(tl.bfloat16)
        total = tl.dot(x_high, high, total)
        small = tl.dot(x_high, low, small)
        if is_split:
            small = tl.dot((x - x_high.to(tl.float32)).to(tl.bfloat16), high, small)
    total += small
    is_logit = (rows < tokens)[:, None] & (columns < experts)[None, :]
    tl.store(logits + rows.to(tl.int64)[:, None] * experts + columns[None, :], total, mask=is_logit)


def router_product(hidden_states: Tensor, weight: SplitWeight) -> Tensor:
    """Logits fp32 [T, experts] of hidden states [T, H] in bf16 or fp32, contiguous.

    A token's logits have the same bits in whatever batch it is.

    Raises:
        ValueError: if hidden states are in another dtype, of another width than the weight, or not contiguous.
    """
    tokens, hidden_size = hidden_states.shape
    experts = weight.high.shape[0]
    if hidden_states.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"hidden states in {hidden_states.dtype}: wanted torch.bfloat16 or torch.float32")
    if weight.high.shape[1] != hidden_size:
        raise ValueError(f"hidden states of width {hidden_size}: wanted {weight.high.shape[1]}, as the weight has")
    if not hidden_states.is_contiguous():
        raise ValueError(f"hidden states of strides {hidden_states.stride()}: wanted a contiguous tensor")
    logits = hidden_states.new_empty(tokens, experts, dtype=torch.float32)
    router_product_kernel[(triton.cdiv(tokens, _ROWS), triton.cdiv(experts, _COLUMNS))](
        hidden_states,
        *weight,
        logits,
        tokens,
        experts,
        hidden_size,
        is_split=hidden_states.dtype == torch.float32,
        block_rows=_ROWS,
        block_columns=_COLUMNS,
        block_depth=_DEPTH,
        num_warps=4,
        num_stages=4,
    )
    return logits
