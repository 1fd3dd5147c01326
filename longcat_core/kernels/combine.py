"""The end of an MoE layer in one pass, for NVIDIA GPUs. Reference: `combine` and `add_identity` in `layers.experts`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024
"""Of a program: 16 bytes of bf16 a thread."""


@triton.jit
def combine_kernel(
    outputs: tl.tensor,
    rows: tl.tensor,
    weights: tl.tensor,
    hidden_states: tl.tensor,
    identity: tl.tensor,
    dense: tl.tensor,
    result: tl.tensor,
    hidden_size: tl.tensor,
    top_k: tl.constexpr,
    is_by_slot: tl.constexpr,
    has_identity: tl.constexpr,
    has_dense: tl.constexpr,
    columns_of_a_program: tl.constexpr,
) -> None:
    """A part of one token a program."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * columns_of_a_program + tl.arange(0, columns_of_a_program)
    exists = columns < hidden_size
    total = tl.zeros([columns_of_a_program], dtype=tl.float32)
    for column in tl.static_range(top_k):
        slot = token * top_k + column
        row = tl.load(rows + slot).to(tl.int64)
        is_chosen = row >= 0
        weight = tl.load(weights + slot, mask=is_chosen, other=0.0)
        if is_by_slot:
            row = slot
        output = tl.load(outputs + row * hidden_size + columns, mask=exists & is_chosen, other=0.0)
        total += weight * output.to(tl.float32)
    own = token * hidden_size + columns
    if has_identity:
        total += tl.load(identity + token) * tl.load(hidden_states + own, mask=exists, other=0.0).to(tl.float32)
    if has_dense:
        total += tl.load(dense + own, mask=exists, other=0.0).to(tl.float32)
    tl.store(result + own, total.to(result.dtype.element_ty), mask=exists)


def combine(
    outputs: Tensor, rows: Tensor, weights: Tensor, hidden_states: Tensor, identity: Tensor, dense: Tensor | None = None
) -> Tensor:
    """`sum_k weights[:, k] outputs[rows[:, k]] + identity * x`, and `dense` if there is one, rounded once from fp32.

    Summed in the order of the columns, whatever else is in the batch, so that a token always has the same bits. What
    belongs to a choice of -1 is not read, its weight neither. A rank of several that sum their results gives its part
    of `identity`.

    outputs: [R, H], unweighted, with rows int32 [T, K] that name the row of each choice or are -1; or [T, K, H], with
    `Routing.ids` or a rank's local ids for rows, whose sign alone counts; weights: fp32 [T, K]; hidden_states: [T, H];
    identity: fp32 [T]; dense: [T, H], of a branch beside the experts. All contiguous. Returns [T, H] in x's dtype.

    Raises:
        ValueError: if outputs have other columns than x, or, by choice, not one row for each choice.
    """
    return _combine(outputs, rows, weights, torch.empty_like(hidden_states), hidden_states, identity, dense)


def weighted_sum(outputs: Tensor, rows: Tensor, weights: Tensor, result: Tensor) -> Tensor:
    """The FFN experts' part of `combine` alone, into `result` [T, H], contiguous, which is returned.

    For an engine that sums the parts of ranks before it adds `identity * x`.

    Raises:
        ValueError: as `combine`.
    """
    return _combine(outputs, rows, weights, result, None, None, None)


def _combine(
    outputs: Tensor,
    rows: Tensor,
    weights: Tensor,
    result: Tensor,
    hidden_states: Tensor | None,
    identity: Tensor | None,
    dense: Tensor | None,
) -> Tensor:
    tokens, hidden_size = result.shape
    is_by_slot = outputs.dim() == 3
    wanted = (*rows.shape, hidden_size) if is_by_slot else (outputs.shape[0], hidden_size)
    if outputs.shape != wanted or rows.shape[0] != tokens:
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)} for {tuple(rows.shape)} choices of hidden states "
            f"{tuple(result.shape)}: wanted ({', '.join(map(str, wanted))})"
        )
    given = [
        tensor for tensor in (outputs, rows, weights, result, hidden_states, identity, dense) if tensor is not None
    ]
    if not all(tensor.is_contiguous() for tensor in given):
        raise ValueError(f"strides {[tensor.stride() for tensor in given]}: wanted contiguous tensors")
    columns = min(_COLUMNS, triton.next_power_of_2(hidden_size))
    combine_kernel[(tokens, triton.cdiv(hidden_size, columns))](
        outputs,
        rows,
        weights,
        hidden_states,
        identity,
        dense,
        result,
        hidden_size,
        top_k=rows.shape[1],
        is_by_slot=is_by_slot,
        has_identity=identity is not None,
        has_dense=dense is not None,
        columns_of_a_program=columns,
        num_warps=4,
    )
    return result
