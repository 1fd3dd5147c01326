"""Whether router and experts of a server can be computed by `longcat_core.kernels`, which is done on request only."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch

from longcat_core.config import LongcatConfig
from longcat_core.quantization import PUBLISHED_BLOCK

CAPABILITY = (9, 0)
"""The least of a GPU for which the kernels were compiled."""


def obstacles_to_kernels(
    config: LongcatConfig, dtype: torch.dtype, capability: tuple[int, int] | None, ranks: int
) -> list[str]:
    """Why `longcat_core.kernels` cannot serve a model, whatever the engine.

    dtype: of the activations; capability: of the GPU, None if it is not NVIDIA's; ranks: over which each expert is
    split, 1 where whole experts are spread over ranks.
    """
    try:
        from longcat_core.kernels.route import MAX_EXPERTS, MAX_TOP_K
    except ImportError as error:
        return [f"Triton cannot be imported ({error}); install the one that the engine asks for"]
    obstacles = []
    if capability is None or capability < CAPABILITY:
        found = "no GPU of NVIDIA's" if capability is None else f"compute capability {capability[0]}.{capability[1]}"
        obstacles.append(f"{found}, wanted compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or more")
    if dtype not in (torch.bfloat16, torch.float32):
        obstacles.append(f"dtype {dtype}, wanted torch.bfloat16 or torch.float32")
    if config.num_experts > MAX_EXPERTS or config.moe_topk > MAX_TOP_K:
        found = f"{config.moe_topk} of {config.num_experts} experts for a token"
        obstacles.append(f"{found}, wanted at most {MAX_TOP_K} of {MAX_EXPERTS}")
    inner = config.expert_ffn_hidden_size // ranks
    if config.quantization is not None and inner % PUBLISHED_BLOCK[0]:
        obstacles.append(f"{inner} rows of an FP8 expert on a rank, wanted a multiple of {PUBLISHED_BLOCK[0]}")
    return obstacles
