"""A worker extension for test_sequence_parallel.py, imported in each rank: the MoE as beside data-parallel ranks.

On a CPU those exchange tokens in a way of our own, as vLLM has no gathering of unequal shares there; here torch's does
it.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vllm.config import ParallelConfig
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

from tests.vllm.noted_collectives import NotedCollectives


class SequenceParallel(NotedCollectives):
    """Nothing is asked of it, either."""


def all_gatherv(
    communicator: CpuCommunicator, inputs: Tensor | list[Tensor], dim: int = 0, sizes: list[int] | None = None
) -> Tensor | list[Tensor]:
    if isinstance(inputs, list):
        return [all_gatherv(communicator, each, dim, sizes) for each in inputs]  # type: ignore[misc]
    assert dim == 0
    assert sizes is not None
    gathered = [inputs.new_empty(size, *inputs.shape[1:]) for size in sizes]
    torch.distributed.all_gather(gathered, inputs.contiguous(), group=communicator.device_group)
    return torch.cat(gathered)


def reduce_scatterv(
    communicator: CpuCommunicator, inputs: Tensor, dim: int = -1, sizes: list[int] | None = None
) -> Tensor:
    assert dim == 0
    assert sizes is not None
    summed = inputs.clone()
    torch.distributed.all_reduce(summed, group=communicator.device_group)
    return summed.split(sizes)[communicator.rank_in_group]


patch = pytest.MonkeyPatch()
patch.setattr(ParallelConfig, "use_sequence_parallel_moe", True)
patch.setattr(CpuCommunicator, "all_gatherv", all_gatherv)
patch.setattr(CpuCommunicator, "reduce_scatterv", reduce_scatterv)
