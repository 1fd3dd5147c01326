"""The expert choices of a step, counted in one call. Reference: `observation.expert_choices.add_step`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from longcat_core.kernels.cpu.library import is_available, library


def takes(ids: Tensor, is_real: Tensor) -> bool:
    """Whether the kernel is there and takes these. torch.compile gets the reference."""
    if torch.compiler.is_compiling():
        return False
    are_known = ids.dtype == torch.int32 and is_real.dtype == torch.int64
    is_laid_out = ids.device.type == "cpu" and ids.stride(-1) == 1 and is_real.is_contiguous()
    return are_known and is_laid_out and is_available()


def add_step(
    tokens: Tensor,
    busiest_expert: Tensor,
    busiest_rank: Tensor,
    ids: Tensor,
    is_real: Tensor,
    rank_of_expert: Tensor,
    ranks: int,
) -> None:
    """As the reference, whose arguments these are. ids: int32 [L, T, K], of any stride but in the last dimension, each
    less than len(rank_of_expert).

    Raises:
        ValueError: for ids of other sizes than the sums and the rows have.
    """
    wanted = len(tokens), len(is_real), tokens.shape[1] - 1
    if ids.shape != wanted:
        raise ValueError(f"ids: {[*ids.shape]}, wanted {[*wanted]}")
    layers, rows, top_k = wanted
    library().longcat_count_choices(
        *(each.data_ptr() for each in (tokens, busiest_expert, busiest_rank, ids)),
        ids.stride(0),
        ids.stride(1),
        is_real.data_ptr(),
        rank_of_expert.data_ptr(),
        layers,
        rows,
        top_k,
        len(rank_of_expert),
        ranks,
    )
