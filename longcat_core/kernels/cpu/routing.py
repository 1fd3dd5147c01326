"""The router's choice, in fp32. Reference: `layers.routing.route`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from longcat_core.kernels.cpu.library import is_available, library
from longcat_core.layers import routing
from longcat_core.layers.routing import Routing


def route(logits: Tensor, bias: Tensor, *, n_routed_experts: int, top_k: int, routed_scaling_factor: float) -> Routing:
    """As the reference, by the compiled kernel where it is there. torch.compile gets the reference, which it fuses."""
    if torch.compiler.is_compiling() or not _takes(logits, bias):
        return routing.route(
            logits,
            bias,
            n_routed_experts=n_routed_experts,
            top_k=top_k,
            routed_scaling_factor=routed_scaling_factor,
        )
    tokens, experts = logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int32)
    weights, identity = torch.empty(tokens, top_k), torch.empty(tokens)
    library().longcat_route(
        ids.data_ptr(),
        weights.data_ptr(),
        identity.data_ptr(),
        logits.data_ptr(),
        bias.data_ptr(),
        routed_scaling_factor,
        tokens,
        experts,
        n_routed_experts,
        top_k,
    )
    return Routing(ids, weights, identity)


def _takes(logits: Tensor, bias: Tensor) -> bool:
    return is_available() and all(t.dtype == torch.float32 and t.is_contiguous() for t in (logits, bias))
