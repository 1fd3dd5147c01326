"""What a `config.json` says of the rotary embedding: every published spelling, read into one dataclass and written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the `qk_rope_head_dim` part of queries and keys, interleaved pairs.

    `factor` 1 alone is plain RoPE; anything else is YaRN (arXiv 2309.00071) as transformers'
    `_compute_yarn_parameters` has it. LongCat-Flash-Thinking-2601 uses YaRN, the other releases plain RoPE.
    """

    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def is_yarn(self) -> bool:
        return self.factor != 1.0 or self.attention_factor is not None


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature (arXiv 2309.00071, equation 22, with DeepSeek's multiplier)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def read_rope(raw: Mapping[str, Any], problems: list[str]) -> RopeConfig | None:
    """`rope_theta` with `rope_scaling` (published) or `rope_parameters` (transformers 5)."""
    found: dict[str, Any] = {"rope_theta": raw.get("rope_theta")}
    for name in ("rope_scaling", "rope_parameters"):
        given = raw.get(name) or {}
        if not isinstance(given, Mapping):
            problems.append(f"{name}: {given!r}, wanted an object")
            return None
        found |= given
    known = len(problems)
    theta = number(found, "rope_theta", problems)
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta=theta) if len(problems) == known else None
    if kind not in ("yarn", "deepseek_yarn"):
        problems.append(f"rope_type: {kind!r}, wanted 'default' or 'yarn'")
        return None
    context = raw.get("max_position_embeddings")
    context = context if isinstance(context, int) else None
    rope = RopeConfig(
        theta=theta,
        factor=1.0 if found.get("factor") == 1 else number(found, "factor", problems, above=1.0),
        original_max_position_embeddings=int(
            number(found, "original_max_position_embeddings", problems, default=context or 1.0)
        ),
        beta_fast=number(found, "beta_fast", problems, default=32.0),
        beta_slow=number(found, "beta_slow", problems, default=1.0),
        mscale=number(found, "mscale", problems, default=0.0, above=-1.0),
        mscale_all_dim=number(found, "mscale_all_dim", problems, default=0.0, above=-1.0),
        attention_factor=None if found.get("attention_factor") is None else number(found, "attention_factor", problems),
        truncate=found.get("truncate") is not False,
    )
    if len(problems) > known:
        return None
    return rope if rope.is_yarn else RopeConfig(theta=theta)


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """In the terms of transformers' `rope_parameters`, but for `rope_theta`."""
    if not rope.is_yarn:
        return {"rope_type": "default"}
    return {"rope_type": "yarn", **{k: v for k, v in vars(rope).items() if k != "theta" and v is not None}}


def number(
    raw: Mapping[str, Any], name: str, problems: list[str], *, default: float | None = None, above: float = 0.0
) -> float:
    """A number above `above`, or the default where the field is absent; else a problem is noted."""
    value = raw.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < math.inf:
        problems.append(f"{name}: {value!r}, wanted a number above {above:g}")
        return 0.0
    return float(value)
