"""The expert choices of a step, counted in one call. Reference: `observation.expert_choices.add_step`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from longcat_core.kernels.cpu.library import is_available, library


def takes(slots: Tensor) -> bool:
    """Whether the kernel is there, and these on the CPU. torch.compile gets the reference."""
    return not torch.compiler.is_compiling() and slots.is_cpu and is_available()


def add_step(
    tokens: Tensor,
    busiest_expert: Tensor,
    busiest_rank: Tensor,
    ids: Sequence[Tensor],
    slots: Tensor,
    first_slot: int,
    rank_of_expert: Tensor,
    ranks: int,
) -> None:
    """As the reference, for rows with slots from `first_slot` on.

    tokens to busiest_rank: `Sums`; ids: int32 [T, K] of each layer, contiguous, each less than len(rank_of_expert);
    slots: int64 [T] or fewer, contiguous, of the first rows.

    Raises:
        ValueError: for ids or slots of another dtype or layout, or of sizes that do not fit.
    """
    layers, columns = tokens.shape
    (rows,), top_k, shape, dtype = slots.shape, columns - 1, ids[0].shape, torch.int32
    if slots.dtype != torch.int64 or not slots.is_contiguous():
        raise ValueError(f"slots: {slots.dtype} with strides {slots.stride()}, wanted torch.int64, contiguous")
    addresses = array(
        "Q", [x.data_ptr() for x in ids if x.shape == shape and x.dtype == dtype and x.is_cpu and x.is_contiguous()]
    )
    if not len(addresses) == len(ids) == layers or shape[0] < rows or shape[1:] != (top_k,):
        found = sorted({f"{x.dtype} {[*x.shape]} with strides {x.stride()} on {x.device}" for x in ids})
        raise ValueError(
            f"ids of {len(ids)} layers: {'; '.join(found)}, wanted {layers} of {dtype} [{rows} or more, {top_k}], "
            "contiguous, on the CPU, the same in all"
        )
    library().longcat_add_choices(
        tokens.data_ptr(),
        busiest_expert.data_ptr(),
        busiest_rank.data_ptr(),
        addresses.buffer_info()[0],
        slots.data_ptr(),
        first_slot,
        rank_of_expert.data_ptr(),
        layers,
        rows,
        top_k,
        len(rank_of_expert),
        ranks,
    )
