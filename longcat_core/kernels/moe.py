"""The FFN experts of one rank, from the kernels for NVIDIA GPUs. Reference: `layers.experts.routed_experts`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from longcat_core.kernels.arrange import arrange
from longcat_core.kernels.combine import weighted_sum
from longcat_core.kernels.experts import ExpertWeights, expert_outputs
from longcat_core.kernels.tiles import tile_for


def routed_experts(
    hidden_states: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: ExpertWeights,
    device: str,
    expert_map: Tensor | None = None,
    *,
    spread_over: int | None = None,
    inner: Tensor | None = None,
    outputs: Tensor | None = None,
    result: Tensor | None = None,
) -> Tensor:
    """The FFN experts' share, `sum_k w_k FFN_k(x)`: [T, H] in x's dtype. Reference: `routed_experts`.

    Ranks' parts are summed before `identity * x` is added. Four launches in 16 bit and up to 1,024 choices: arrange,
    two products, sum; FP8 has one more. The tile depends on T alone, so a graph can be captured.

    hidden_states: [T, H]; ids: int32 [T, K]; weights: fp32 [T, K]; device: as `torch.cuda.get_device_name` has it, for
    the tiles; expert_map: int32 [E], the local number of a global expert, or -1 if another rank has it; spread_over:
    among how many experts the router chose, for the tile; if it is not given, those of the map, or of this rank;
    inner, outputs: memory, as `expert_outputs` takes it; result: [T, H], which may lie in `inner`.

    Raises:
        ValueError: for shapes, dtypes and strides that do not fit, as the kernels say.
    """
    num_experts = experts.w2.shape[0]
    if spread_over is None:
        spread_over = num_experts if expert_map is None else expert_map.shape[0]
    tile = tile_for(device, experts.precision, -(-ids.numel() // spread_over))
    arrangement = arrange(ids, num_experts, tile.rows, expert_map)
    unweighted = expert_outputs(hidden_states, arrangement, experts, tile, inner, outputs)
    result = torch.empty_like(hidden_states) if result is None else result
    return weighted_sum(unweighted, arrangement.local_ids, weights, result)
