"""LongCat's router as a pure function: which FFN experts a token takes, and how much of itself it keeps."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """The contract between the router and every expert implementation, for T tokens and top K.

    `moe(x) = sum_k weights[:, k] * FFN_ids[:, k](x) + identity * x`, accumulated in fp32. A choice of -1 costs
    nothing: no GEMM row, no dispatch, no place in a load statistic.
    """

    ids: Tensor
    """int32 [T, K]: an FFN expert, or -1 where the router chose a zero expert."""
    weights: Tensor
    """fp32 [T, K]: softmax score x routed_scaling_factor, 0 where `ids` is -1."""
    identity: Tensor
    """fp32 [T]: the sum of the scaled scores of the zero experts chosen."""


def route(logits: Tensor, bias: Tensor, *, n_routed_experts: int, top_k: int, routed_scaling_factor: float) -> Routing:
    """Choose the top K of FFN and zero experts together (report, section 2.1.1).

    logits: fp32 [T, n_routed_experts + zero experts]; bias: fp32, `e_score_correction_bias` of that width, which
    takes part in the choice only. The scores are not renormalised over the chosen, and the scaling factor is on
    zero experts as well.
    """
    scores = logits.float().softmax(dim=-1)
    chosen = (scores + bias.float()).topk(top_k, dim=-1).indices
    weights = scores.gather(-1, chosen) * routed_scaling_factor
    is_zero = chosen >= n_routed_experts
    return Routing(
        ids=chosen.masked_fill(is_zero, -1).to(torch.int32),
        weights=weights.masked_fill(is_zero, 0.0),
        identity=(weights * is_zero).sum(dim=-1),
    )


class RouterFunctions(NamedTuple):
    """What computes a router on a device."""

    route: Callable[..., Routing]
    """`route`, or what equals it."""
    product: Callable[[Tensor, Tensor], Tensor] | None = None
    """(hidden states [T, H], weight fp32 [experts, H]) -> logits, fp32 [T, experts]; None for the engine's own."""


def expert_rows(ids: Tensor, num_experts: int) -> Tensor:
    """GEMM rows of each FFN expert: integer [T, K] -> int64 [num_experts]."""
    return torch.bincount(ids[ids >= 0].long(), minlength=num_experts)


def relative_load(rows: Tensor) -> Tensor:
    """rows: [..., experts or ranks], any number type. Returns each one's share over the mean share, fp64 [..., same]:
    1 if all have the same load, 0 if there are no rows at all."""
    return rows.double() / rows.double().mean(dim=-1, keepdim=True).clamp(min=1e-9)


def rank_imbalance(rows: Tensor, ranks: int) -> float:
    """The busiest rank's rows over the mean, for experts laid out on `ranks` ranks in order, as evenly as can be.

    Raises:
        ValueError: if there are fewer experts than ranks.
    """
    if rows.numel() < ranks:
        raise ValueError(f"{rows.numel()} experts on {ranks} ranks: wanted at least one expert a rank")
    return float(relative_load(torch.stack([part.sum() for part in rows.tensor_split(ranks)])).max())
