"""The whole MoE on one rank, from the kernels for NVIDIA GPUs. Reference: `layers.experts.moe`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor

from longcat_core.kernels.arrange import arrange
from longcat_core.kernels.combine import combine
from longcat_core.kernels.experts import ExpertWeights, expert_outputs
from longcat_core.kernels.tiles import tile_for
from longcat_core.layers.routing import Routing


def moe(
    hidden_states: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    device: str,
    expert_map: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    """`sum_k w_k FFN_k(x) + identity * x`, and `dense` if there is one: [T, H] in x's dtype.

    Four launches in 16 bit and up to 1,024 choices: arrange, two products, combine; FP8 has one more. The tile depends
    on T alone, so a graph can be captured.

    hidden_states: [T, H]; device: as `torch.cuda.get_device_name` has it, for the tiles; expert_map: int32 [E], the
    local number of a global expert, or -1 if another rank has it: then this is the rank's part, and `identity` must be
    its part as well; dense: [T, H], of a branch beside the experts.

    Raises:
        ValueError: for shapes, dtypes and strides that do not fit, as the kernels say.
    """
    num_experts = weights.w2.shape[0]
    of_all_ranks = num_experts if expert_map is None else expert_map.shape[0]
    tile = tile_for(device, weights.precision, -(-routing.ids.numel() // of_all_ranks))
    arrangement = arrange(routing.ids, num_experts, tile.rows, expert_map)
    outputs = expert_outputs(hidden_states, arrangement, weights, tile)
    return combine(outputs, arrangement.local_ids, routing.weights, hidden_states, routing.identity, dense)
