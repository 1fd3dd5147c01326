"""The router's choice in one launch, for NVIDIA GPUs. Reference: `layers.routing.route`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longcat_core.layers.routing import Routing

MAX_EXPERTS = 1024
"""FFN and zero experts together: one warp holds a token's scores in its registers."""
MAX_TOP_K = 16

_TAKEN = tl.constexpr(-(2**63) + 1)
"""Below the key of any expert."""


@triton.jit
def route_kernel(
    logits: tl.tensor,
    bias: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    identity: tl.tensor,
    stride: tl.tensor,
    n_experts: tl.tensor,
    n_routed_experts: tl.tensor,
    routed_scaling_factor: tl.tensor,
    top_k: tl.constexpr,
    padded_experts: tl.constexpr,
    padded_top_k: tl.constexpr,
) -> None:
    """One token a program."""
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, padded_experts)
    exists = experts < n_experts
    row = logits + token * stride
    values = tl.load(row + experts, mask=exists, other=float("-inf")).to(tl.float32)
    largest = tl.max(values, axis=0)
    exponentials = tl.exp(values - largest)
    total = tl.sum(exponentials, axis=0)
    ranked = exponentials / total + tl.load(bias + experts, mask=exists, other=0.0).to(tl.float32)

    # The bits of a float, without those of the sign where it is negative, are an integer of the same order. Below them
    # goes the expert, counted from the last: no two keys are equal, and of equal scores the first expert is greatest.
    bits = ranked.to(tl.int32, bitcast=True)
    order = tl.where(ranked == ranked, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)  # NaN is greatest, as in topk
    keys = (order.to(tl.int64) << 32) | (padded_experts - 1 - experts)
    keys = tl.where(exists, keys, _TAKEN)
    columns = tl.arange(0, padded_top_k)
    chosen = tl.zeros([padded_top_k], dtype=tl.int32)
    for column in range(top_k):
        best = tl.max(keys, axis=0)
        expert = padded_experts - 1 - (best & (padded_experts - 1)).to(tl.int32)
        chosen = tl.where(columns == column, expert, chosen)
        keys = tl.where(keys == best, _TAKEN, keys)

    scores = tl.exp(tl.load(row + chosen).to(tl.float32) - largest) / total * routed_scaling_factor
    is_zero = chosen >= n_routed_experts
    is_column = columns < top_k
    slots = token * top_k + columns
    tl.store(ids + slots, tl.where(is_zero, -1, chosen), mask=is_column)
    tl.store(weights + slots, tl.where(is_zero, 0.0, scores), mask=is_column)
    tl.store(identity + token, tl.sum(tl.where(is_zero & is_column, scores, 0.0), axis=0))


def route(logits: Tensor, bias: Tensor, *, n_routed_experts: int, top_k: int, routed_scaling_factor: float) -> Routing:
    """As the reference: the columns are in order of score + bias, greatest first.

    Of equal sums the lower expert comes first, which torch's topk does not promise. Where two sums differ by their
    rounding in fp32 alone, the choice may be the other one than the reference's. A token's routing has the same bits in
    whatever batch it is.

    logits: fp32 or bf16 [T, n_routed_experts + zero experts], each row contiguous; bias: fp32, of that width.

    Raises:
        ValueError: for more experts or columns than one warp holds, a bias of another width, or rows not contiguous.
    """
    tokens, n_experts = logits.shape
    if n_experts > MAX_EXPERTS:
        raise ValueError(f"logits of {n_experts} experts: wanted at most {MAX_EXPERTS}; use layers.routing.route")
    if not 0 < top_k <= min(n_experts, MAX_TOP_K):
        raise ValueError(f"top_k {top_k} of {n_experts} experts: wanted 1 to {min(n_experts, MAX_TOP_K)}")
    if bias.shape != (n_experts,):
        raise ValueError(f"bias of shape {tuple(bias.shape)}: wanted ({n_experts},), one for each column of logits")
    if not (logits[:1].is_contiguous() and bias.is_contiguous()):
        raise ValueError(f"logits of strides {logits.stride()}, bias of {bias.stride()}: wanted contiguous rows")
    routing = Routing(
        ids=torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device),
        weights=torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device),
        identity=torch.empty(tokens, dtype=torch.float32, device=logits.device),
    )
    route_kernel[(tokens,)](
        logits,
        bias,
        *routing,
        logits.stride(0),
        n_experts,
        n_routed_experts,
        routed_scaling_factor,
        top_k=top_k,
        padded_experts=triton.next_power_of_2(n_experts),
        padded_top_k=triton.next_power_of_2(top_k),
        num_warps=1,
    )
    return routing
