"""The whole MoE on one rank, from the kernels for NVIDIA GPUs. Reference: `layers.experts`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from longcat_core.kernels.arrange import arrange
from longcat_core.kernels.combine import combine, weighted_sum
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
    """`sum_k w_k FFN_k(x) + identity * x`, and `dense` if there is one: [T, H] in x's dtype. Reference: `moe`.

    Four launches in 16 bit and up to 1,024 choices: arrange, two products, combine; FP8 has one more. The tile depends
    on T alone, so a graph can be captured.

    hidden_states: [T, H]; device: as `torch.cuda.get_device_name` has it, for the tiles; expert_map: int32 [E], the
    local number of a global expert, or -1 if another rank has it: then this is the rank's part, and `identity` must be
    its part as well; dense: [T, H], of a branch beside the experts.

    Raises:
        ValueError: for shapes, dtypes and strides that do not fit, as the kernels say.
    """
    outputs, local_ids = _outputs(hidden_states, routing.ids, weights, device, expert_map, None)
    return combine(outputs, local_ids, routing.weights, hidden_states, routing.identity, dense)


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

    For engines, which sum the parts of ranks before `identity * x` is added. As `moe` otherwise; spread_over: among how
    many experts the router chose, for the tile; if it is not given, those of the map, or of this rank; inner, outputs:
    memory, as `expert_outputs` takes it; result: [T, H], which may lie in `inner`.

    Raises:
        ValueError: as `moe`.
    """
    outputs, local_ids = _outputs(hidden_states, ids, experts, device, expert_map, spread_over, inner, outputs)
    return weighted_sum(outputs, local_ids, weights, torch.empty_like(hidden_states) if result is None else result)


def _outputs(
    hidden_states: Tensor,
    ids: Tensor,
    experts: ExpertWeights,
    device: str,
    expert_map: Tensor | None,
    spread_over: int | None,
    inner: Tensor | None = None,
    outputs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Each choice's output, unweighted, and the local ids, -1 for choices without one."""
    num_experts = experts.w2.shape[0]
    if spread_over is None:
        spread_over = num_experts if expert_map is None else expert_map.shape[0]
    tile = tile_for(device, experts.precision, -(-ids.numel() // spread_over))
    arrangement = arrange(ids, num_experts, tile.rows, expert_map)
    return expert_outputs(hidden_states, arrangement, experts, tile, inner, outputs), arrangement.local_ids
