"""For test_strength.py: a worker extension, imported by vLLM in each rank, under which each takes another's experts."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from torch import Tensor

from longcat_core.layers.experts import ExpertFFN, routed_experts
from longcat_vllm.devices.cpu import experts


def _with_the_map_reversed(
    hidden_states: Tensor, ids: Tensor, weights: Tensor, ffn: ExpertFFN, expert_map: Tensor
) -> Tensor:
    return routed_experts(hidden_states, ids, weights, ffn, expert_map.flip(0))


class BrokenExpertMap:
    """Nothing is asked of it: what breaks the map is that this module is imported."""


experts.routed_experts = _with_the_map_reversed
