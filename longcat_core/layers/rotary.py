"""Rotary embedding of LongCat's MLA: interleaved pairs, computed from positions in fp32, plain or YaRN."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import torch
from torch import Tensor

from longcat_core.config import LongcatConfig, RopeConfig, yarn_mscale


def inverse_frequencies(config: LongcatConfig) -> Tensor:
    """fp32 [qk_rope_head_dim / 2], in radians a position."""
    rope, dim = config.rope, config.qk_rope_head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    plain = 1.0 / rope.theta**exponents
    if not rope.is_yarn:
        return plain
    context = rope.original_max_position_embeddings or config.max_position_embeddings
    low, high = _yarn_correction_range(rope, context, dim)
    ramp = ((torch.arange(dim // 2).float() - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def attention_factor(rope: RopeConfig) -> float:
    """YaRN's factor on cos and sin; 1 for plain RoPE."""
    if not rope.is_yarn:
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor)


def cos_sin(positions: Tensor, inverse_frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Angles of each position: integer [...] -> two fp32 [..., qk_rope_head_dim / 2]."""
    angles = positions.unsqueeze(-1).float() * inverse_frequencies
    return angles.cos() * factor, angles.sin() * factor


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ... of the last dimension, in fp32.

    x: [..., D], any float dtype; cos and sin: fp32, broadcastable to [..., D / 2]. The result has x's dtype and
    keeps the pairs interleaved. transformers writes halves instead; scores do not see the difference, as queries
    and keys are permuted alike.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def rotate(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [T, heads, nope + rope] with the last `rope` dimensions rotated, and keys [T, 1, rope] rotated.

    cos and sin: fp32 [T, 1, rope / 2].
    """
    q_nope, q_rope = queries.split([queries.shape[-1] - keys.shape[-1], keys.shape[-1]], dim=-1)
    rotated = torch.cat((q_nope, rotate_interleaved(q_rope, cos, sin)), dim=-1)
    return rotated, rotate_interleaved(keys, cos, sin)


def _yarn_correction_range(rope: RopeConfig, context: int, dim: int) -> tuple[float, float]:
    def dimension_of(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high
