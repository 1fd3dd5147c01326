"""The zero-expert-aware MoE: one entry, `moe`, over row-compacted FFN experts."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_core.layers.routing import Routing

ExpertFFN = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [R, H], experts int32 [R, k], weights fp32 [R, k]) -> [R, H]: the weighted sum of each row's k experts."""


class SparseFFN(ABC):
    """An `ExpertFFN` that computes nothing for an expert of -1, so that its rows need not be compacted."""

    @abstractmethod
    def __call__(self, rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor: ...


class Rows(NamedTuple):
    """The choices of FFN experts, as a list of GEMM rows in token order."""

    tokens: Tensor
    """int64 [R]: the token of each row, ascending."""
    experts: Tensor
    """int32 [R]: the FFN expert of each row."""
    weights: Tensor
    """fp32 [R]."""


class Shortcut(NamedTuple):
    """What a layer's MoE adds at the end of the layer: `residual + sum over ranks of (dense FFN + partial) + whole`.

    One sum over ranks serves the second dense FFN and the experts, and the zero experts, which every rank computes
    alike, stay out of it. `whole` is added to the residual, so that the sum is read by the next norm and by nothing
    else: engines have kernels for a sum, the residual and a norm in one.
    """

    partial: Tensor | None
    """[T, H]: this rank's part of the FFN experts' share, or None where a transport brings back the whole of it."""
    whole: Tensor
    """[T, H]: the zero experts' share, and the FFN experts' if that is whole; added once, on every rank."""


def moe(hidden_states: Tensor, routing: Routing, w13: Tensor, w2: Tensor) -> Tensor:
    """The whole MoE on one rank: `sum_k w_k FFN_k(x) + identity * x`, accumulated in fp32.

    hidden_states: [T, H]; w13: [E, 2 I, H], gate above up; w2: [E, H, I]. Returns [T, H] in x's dtype. Runs
    everywhere torch does and is differentiable.
    """
    routed = routed_experts(hidden_states, routing.ids, routing.weights, grouped_ffn(w13, w2))
    return add_identity(routed, hidden_states, routing.identity)


def add_identity(routed: Tensor, hidden_states: Tensor, identity: Tensor) -> Tensor:
    """`routed + identity * x` in fp32, for fp32 `identity` [T]: the zero experts' whole contribution.

    Under tensor or expert parallelism call it once, on the rank that owns the token, after the reduction.
    """
    return torch.addcmul(routed.float(), hidden_states.float(), identity.unsqueeze(-1)).to(hidden_states.dtype)


def identity_share(hidden_states: Tensor, identity: Tensor) -> Tensor:
    """`identity * x` in x's dtype, for fp32 `identity` [T]: the zero experts' whole contribution, by itself."""
    return (hidden_states.float() * identity.unsqueeze(-1)).to(hidden_states.dtype)


def routed_experts(
    hidden_states: Tensor, ids: Tensor, weights: Tensor, ffn: ExpertFFN, expert_map: Tensor | None = None
) -> Tensor:
    """The FFN experts' share, `sum_k w_k FFN_k(x)`: [T, H] in x's dtype; `ffn` sees rows of FFN experts only, if it is
    no `SparseFFN`.

    ids, weights: as in `Routing`; expert_map: int32 [E], the local number of a global expert, or -1 if another rank
    has it: choices of that expert cost nothing here either.
    """
    if expert_map is not None:
        ids = torch.where(ids >= 0, expert_map[ids.clamp(min=0)], -1)
    if isinstance(ffn, SparseFFN):
        return ffn(hidden_states, ids, weights)
    if ids.shape[0] == 1:  # one token needs no gathering
        chosen = [place for place, expert in enumerate(ids[0].tolist()) if expert >= 0]
        if not chosen:
            return torch.zeros_like(hidden_states)
        places = torch.tensor(chosen, device=ids.device)
        return ffn(hidden_states, ids.index_select(1, places), weights.index_select(1, places))
    kept = ids >= 0
    if not kept.any():
        return torch.zeros_like(hidden_states)
    if kept.all():
        return ffn(hidden_states, ids, weights)
    rows = compact(ids, weights)
    inputs = hidden_states.index_select(0, rows.tokens)
    outputs = ffn(inputs, rows.experts.unsqueeze(1), rows.weights.unsqueeze(1))
    return combine(outputs, rows.tokens, ids.shape[0])


def compact(ids: Tensor, weights: Tensor) -> Rows:
    """List the choices of FFN experts, in token order; ids and weights: [T, K], where an id of -1 is no FFN expert."""
    slots = (ids >= 0).flatten().nonzero().squeeze(1)
    return Rows(tokens=slots // ids.shape[1], experts=ids.flatten()[slots], weights=weights.flatten()[slots])


def combine(outputs: Tensor, tokens: Tensor, num_tokens: int) -> Tensor:
    """Sum of each token's weighted rows: [R, H] -> [num_tokens, H], accumulated in fp32; tokens: [R], ascending."""
    if outputs.requires_grad or outputs.device.type != "cpu":
        summed = outputs.new_zeros(num_tokens, outputs.shape[1], dtype=torch.float32)
        return summed.index_add(0, tokens, outputs.float()).to(outputs.dtype)
    # On a CPU index_add is serial; embedding_bag is the same segmented sum, vectorised and parallel, and
    # accumulates in fp32 whatever the dtype.
    starts = torch.searchsorted(tokens, torch.arange(num_tokens))
    return F.embedding_bag(torch.arange(outputs.shape[0]), outputs, starts, mode="sum")


def grouped_ffn(w13: Tensor, w2: Tensor) -> ExpertFFN:
    """SwiGLU experts as one dense product an expert. w13: [E, 2 I, H], gate above up; w2: [E, H, I]."""
    return ffn_by_expert(
        w13.shape[0],
        gate_up=lambda expert, rows: F.linear(rows, w13[expert]),
        down=lambda expert, rows: F.linear(rows, w2[expert]),
    )


def ffn_by_expert(
    num_experts: int, gate_up: Callable[[int, Tensor], Tensor], down: Callable[[int, Tensor], Tensor]
) -> ExpertFFN:
    """SwiGLU over rows sorted by expert, from the two products of one expert with its rows, [n, H] -> [n, 2 I] and
    [n, I] -> [n, H]. Experts without rows are not called."""

    def ffn(rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        if rows.shape[0] == 1:  # experts of one token are distinct, and there is nothing to sort
            gate, up = torch.cat([gate_up(expert, rows) for expert in experts[0].tolist()]).chunk(2, dim=-1)
            inner = (F.silu(gate) * up).split(1)
            outputs = torch.cat([down(e, part) for e, part in zip(experts[0].tolist(), inner, strict=True)])
            return (outputs.float() * weights.T).sum(dim=0, keepdim=True).to(rows.dtype)
        slots = experts.flatten()
        order = slots.argsort(stable=True)
        counts = [(e, n) for e, n in enumerate(torch.bincount(slots, minlength=num_experts).tolist()) if n]
        sizes = [n for _, n in counts]

        def by_expert(product: Callable[[int, Tensor], Tensor], inputs: Tensor) -> Tensor:
            return torch.cat([product(e, part) for (e, _), part in zip(counts, inputs.split(sizes), strict=True)])

        gate, up = by_expert(gate_up, rows[order // experts.shape[1]]).chunk(2, dim=-1)
        outputs = by_expert(down, F.silu(gate) * up)[order.argsort()].unflatten(0, experts.shape)
        weighted = outputs.float() * weights.unsqueeze(-1)
        return (weighted.squeeze(1) if experts.shape[1] == 1 else weighted.sum(dim=1)).to(rows.dtype)

    return ffn
