"""Router logits in nearly fp32 on the tensor cores of NVIDIA GPUs. Reference: `x.float() @ weight.float().T`.

A number in fp32 is the sum of two in bf16 to within 2^-17 of it. Of the four products of such sums the smallest is left
out. What is left out and rounded is about 2^-16 of each term, where products in bf16 alone have 2^-8 and fp32 2^-24.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS, _DEPTH = 64, 32, 64


@triton.jit
def _split(numbers: tl.tensor) -> tl.tuple:
    """A tile as the sum of two in bf16; that of what is in bf16 has no low part."""
    high = numbers.to(tl.bfloat16)
    return high, (numbers.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def router_product_kernel(
    hidden_states: tl.tensor,
    weight: tl.tensor,
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
        high, low = _split(tl.trans(tl.load(weight + places + depths, mask=is_weight, other=0.0)))
        x_high, x_low = _split(x)
        total = tl.dot(x_high, high, total)
        small = tl.dot(x_high, low, small)
        if is_split:
            small = tl.dot(x_low, high, small)
    total += small
    is_logit = (rows < tokens)[:, None] & (columns < experts)[None, :]
    tl.store(logits + rows.to(tl.int64)[:, None] * experts + columns[None, :], total, mask=is_logit)


def router_product(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """Logits fp32 [T, experts] of hidden states [T, H] in bf16 or fp32, and a weight fp32 [experts, H]; contiguous.

    A token's logits have the same bits in whatever batch it is. The weight is taken apart in the kernel, so that there
    is nothing to prepare after it is loaded, or loaded anew.

    Raises:
        ValueError: if hidden states or the weight are in another dtype, of different widths, or not contiguous.
    """
    tokens, hidden_size = hidden_states.shape
    experts = weight.shape[0]
    if hidden_states.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"hidden states in {hidden_states.dtype}: wanted torch.bfloat16 or torch.float32")
    if weight.dtype != torch.float32 or weight.shape[1] != hidden_size:
        found = f"{tuple(weight.shape)} in {weight.dtype}"
        raise ValueError(f"weight of {found}: wanted width {hidden_size}, as hidden states have, in torch.float32")
    if not (hidden_states.is_contiguous() and weight.is_contiguous()):
        found = f"{hidden_states.stride()} and {weight.stride()}"
        raise ValueError(f"hidden states and weight of strides {found}: wanted contiguous tensors")
    logits = hidden_states.new_empty(tokens, experts, dtype=torch.float32)
    router_product_kernel[(triton.cdiv(tokens, _ROWS), triton.cdiv(experts, _COLUMNS))](
        hidden_states,
        weight,
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
