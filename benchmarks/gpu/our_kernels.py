"""Our kernels as they are measured: a MoE of the batch as an engine computes it, with the table's tile or another."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.inputs import Batch
from longcat_core.kernels.arrange import arrange
from longcat_core.kernels.combine import weighted_sum
from longcat_core.kernels.experts import ExpertWeights, expert_outputs
from longcat_core.kernels.moe import routed_experts
from longcat_core.kernels.tiles import Tile
from longcat_core.layers.experts import add_identity


class OurMoE:
    """With the tile that `kernels.tiles` has for the device. The identity is compiled by torch.compile where
    `is_compiled`, as it is in a server."""

    def __init__(self, weights: ExpertWeights, device_name: str, is_compiled: bool) -> None:
        self._weights, self._device_name = weights, device_name
        self.add_identity = torch.compile(add_identity, dynamic=True) if is_compiled else add_identity

    def __call__(self, batch: Batch) -> Tensor:
        """[R, H]."""
        x, routing = batch.hidden_states, batch.routing
        given = (x, routing.ids, routing.weights, self._weights, self._device_name, batch.expert_map)
        return self.add_identity(routed_experts(*given), x, routing.identity)


def with_tile(batch: Batch, weights: ExpertWeights, tile: Tile) -> Tensor:
    """[R, H], the FFN experts' part, as `kernels.moe` with another tile."""
    arrangement = arrange(batch.routing.ids, weights.w2.shape[0], tile.rows, batch.expert_map)
    outputs = expert_outputs(batch.hidden_states, arrangement, weights, tile)
    result = torch.empty_like(batch.hidden_states)
    return weighted_sum(outputs, arrangement.local_ids, batch.routing.weights, result)
