"""Our kernels as they are measured: a MoE of the batch, with the table's tile or with a given one."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor

from benchmarks.gpu.inputs import Batch
from longcat_core.kernels.arrange import arrange
from longcat_core.kernels.combine import combine
from longcat_core.kernels.experts import ExpertWeights, expert_outputs
from longcat_core.kernels.moe import moe
from longcat_core.kernels.tiles import Tile


def of_the_table(batch: Batch, weights: ExpertWeights, device_name: str) -> Tensor:
    """[R, H], with the tile that `kernels.tiles` has for the device."""
    return moe(batch.hidden_states, batch.routing, weights, device_name, batch.expert_map)


def with_tile(batch: Batch, weights: ExpertWeights, tile: Tile) -> Tensor:
    """[R, H], as `kernels.moe` with another tile."""
    routing = batch.routing
    arrangement = arrange(routing.ids, weights.w2.shape[0], tile.rows, batch.expert_map)
    outputs = expert_outputs(batch.hidden_states, arrangement, weights, tile)
    return combine(outputs, arrangement.local_ids, routing.weights, batch.hidden_states, routing.identity)
