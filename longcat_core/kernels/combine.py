"""The weighted sum of a token's choices in one pass, for NVIDIA GPUs. Reference: `layers.experts.combine`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024
"""Of a program: 16 bytes of bf16 a thread."""


@triton.jit
def combine_kernel(
    outputs: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    result: tl.tensor,
    hidden_size: tl.tensor,
    top_k: tl.constexpr,
    columns_of_a_program: tl.constexpr,
) -> None:
    """A part of one token a program."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * columns_of_a_program + tl.arange(0, columns_of_a_program)
    exists = columns < hidden_size
    total = tl.zeros([columns_of_a_program], dtype=tl.float32)
    for column in tl.static_range(top_k):
        slot = token * top_k + column
        is_chosen = tl.load(ids + slot) >= 0
        weight = tl.load(weights + slot, mask=is_chosen, other=0.0)
        output = tl.load(outputs + slot * hidden_size + columns, mask=exists & is_chosen, other=0.0)
        total += weight * output.to(tl.float32)
    tl.store(result + token * hidden_size + columns, total.to(result.dtype.element_ty), mask=exists)


def weighted_sum(outputs: Tensor, ids: Tensor, weights: Tensor, result: Tensor) -> Tensor:
    """`sum_k weights[:, k] outputs[:, k]` over choices with an id, rounded once from fp32, into `result`, which is
    returned. Ranks' sums are summed before `identity * x` is added.

    Summed in the order of the columns, whatever else is in the batch, so that a token always has the same bits. What
    belongs to a choice of -1 is not read, its weight neither.

    outputs: [T, K, H], unweighted; ids: int32 [T, K], `Routing.ids` or a rank's local ids, whose sign alone counts;
    weights: fp32 [T, K]; result: [T, H]. All contiguous.

    Raises:
        ValueError: if a shape does not fit.
    """
    tokens, hidden_size = result.shape
    if outputs.shape != (*ids.shape, hidden_size) or ids.shape[0] != tokens:
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)} for {tuple(ids.shape)} choices of hidden states "
            f"{tuple(result.shape)}: wanted ({tokens}, {ids.shape[1]}, {hidden_size})"
        )
    given = (outputs, ids, weights, result)
    if not all(tensor.is_contiguous() for tensor in given):
        raise ValueError(f"strides {[tensor.stride() for tensor in given]}: wanted contiguous tensors")
    columns = min(_COLUMNS, triton.next_power_of_2(hidden_size))
    combine_kernel[(tokens, triton.cdiv(hidden_size, columns))](
        outputs,
        ids,
        weights,
        result,
        hidden_size,
        top_k=ids.shape[1],
        columns_of_a_program=columns,
        num_warps=4,
    )
    return result
