"""Random weights that behave: logits with clear winners, and a router that takes experts of both kinds."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.weights import names

# Standard deviation of the logits. Of a few thousand draws the two largest are then about half a unit apart.
_LOGITS_STD = 2.0
# Standard deviation of a query's product with a key. At 1 attention is nearly a mean over the context.
_SCORES_STD = 2.0
# SwiGLU of unit normals has a standard deviation of about 0.6, which `down_proj` makes up for.
_SWIGLU_STD = 0.6

_ROUTER = re.compile(r".*\.mlp\.router\..*")


def draw(config: LongcatConfig, *, seed: int, dtype: torch.dtype, with_mtp: bool) -> dict[str, Tensor]:
    """Every published tensor, by name: `dtype`, but fp32 for the router, as it is published.

    Inputs of unit variance leave each projection with unit variance, so that the two layers of a toy see as much
    of their context as of the last token. MLA's scales are counted in: they are there to make up for the low ranks.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in names.expected_tensors(config, with_mtp).items():
        mean, std = _moments(name, shape, config)
        drawn = torch.randn(shape, generator=generator) * std + mean
        tensors[name] = drawn if _ROUTER.fullmatch(name) else drawn.to(dtype)
    return tensors


def _moments(name: str, shape: tuple[int, ...], config: LongcatConfig) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's entries."""
    kind = name.split(".")[-2]
    if name.endswith(".e_score_correction_bias"):
        return 0.0, 0.5 / config.num_experts  # half a mean score: it changes the choice without making it
    if len(shape) == 1:
        return 1.0, 0.1  # norms, not all ones, so that leaving one out shows
    if kind == "embed_tokens":
        # A tied embedding is the output head too.
        return 0.0, _LOGITS_STD / math.sqrt(config.hidden_size) if config.tie_word_embeddings else 1.0
    gains = {
        "lm_head": _LOGITS_STD,
        "q_b_proj": _SCORES_STD / config.q_scale,
        "kv_b_proj": 1.0 / config.kv_scale,
        "down_proj": 1.0 / _SWIGLU_STD,
    }
    return 0.0, gains.get(kind, 1.0) / math.sqrt(shape[1])
