"""The load plan: where each published tensor goes, in an engine's model and in the reference."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.weights.names import MTP_PREFIX, SCALE_SUFFIX, expected_tensors, mtp_tensors

_EXPERT = re.compile(r"(?P<moe>.*\.mlp)\.experts\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.(?P<suffix>\w+)")


@dataclass(frozen=True)
class Layout:
    """How an engine names the parameters that hold more than one published tensor."""

    fused_qkv_a: str
    """The module of `q_a_proj`, whose rows come first, and `kv_a_proj_with_mqa`."""
    experts: str
    """The module of a layer's FFN experts, below its `mlp`."""


class Target(NamedTuple):
    """Where an engine loads one published tensor."""

    parameter: str
    """Name of the parameter in the engine's model."""
    part: int | None = None
    """In a parameter that fuses two projections: 0 for the first rows, 1 for the others."""
    expert: int | None = None
    """FFN expert, in a parameter that stacks them."""
    shard: str | None = None
    """What engines call the part of an expert: w1 (gate), w2 (down), w3 (up)."""
    factor: float = 1.0
    """The tensor is multiplied by it while it is loaded."""

    def folded(self, tensor: Tensor) -> Tensor:
        """The tensor that is loaded. A scaled one is fp32, so that it is rounded only once: to the served dtype."""
        return tensor if self.factor == 1.0 else tensor.float() * self.factor


def load_plan(config: LongcatConfig, layout: Layout) -> Mapping[str, Target]:
    """Published name to target, for every tensor of the model, with the scales that an FP8 release has beside its
    weights. The norms inside MLA take the MLA scales into their weights, so that the forward pass has none."""
    return _plan(expected_tensors(config, with_mtp=False), config, layout)


def mtp_load_plan(config: LongcatConfig, layout: Layout) -> Mapping[str, Target]:
    """As `load_plan`, where the MTP layer is a model of its own."""
    renamed = _plan(mtp_tensors(config), config, layout).items()
    return {
        name: target._replace(parameter=f"model.{target.parameter.removeprefix(MTP_PREFIX)}")
        for name, target in renamed
    }


def _plan(tensors: Mapping[str, tuple[int, ...]], config: LongcatConfig, layout: Layout) -> dict[str, Target]:
    found: dict[str, Target] = {}
    for name, shape in tensors.items():
        found[name] = _target(name, config, layout)
        if len(shape) == 2:
            found[name + SCALE_SUFFIX] = _target(name + SCALE_SUFFIX, config, layout)
    return found


def _target(name: str, config: LongcatConfig, layout: Layout) -> Target:
    if match := _EXPERT.fullmatch(name):
        stacked, shard = {"gate": ("w13", "w1"), "up": ("w13", "w3"), "down": ("w2", "w2")}[match["part"]]
        parameter = f"{match['moe']}.{layout.experts}.{stacked}_{match['suffix']}"
        return Target(parameter, expert=int(match["expert"]), shard=shard)
    if name.endswith(".q_a_layernorm.weight"):
        return Target(name, factor=config.q_scale)
    if name.endswith(".kv_a_layernorm.weight"):
        return Target(name, factor=config.kv_scale)
    if name.count(".") < 2:
        return Target(name)
    module, projection, suffix = name.rsplit(".", 2)
    packed = {
        "q_a_proj": (layout.fused_qkv_a, 0),
        "kv_a_proj_with_mqa": (layout.fused_qkv_a, 1),
        "gate_proj": ("gate_up_proj", 0),
        "up_proj": ("gate_up_proj", 1),
    }
    if projection not in packed:
        return Target(name)
    target, part = packed[projection]
    return Target(f"{module}.{target}.{suffix}", part=part)


def expert_of(name: str) -> int | None:
    """The FFN expert that a published tensor belongs to, or None."""
    match = _EXPERT.fullmatch(name)
    return int(match["expert"]) if match else None


class Place(NamedTuple):
    """Where a published tensor goes in `reference.LongcatForCausalLM`: a parameter, and a part of it."""

    parameter: str
    part: int | slice | tuple[int, slice]


def place(name: str, config: LongcatConfig) -> Place:
    """Experts are stacked, the gate's rows above the up projection's; everything else keeps its name."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return Place(name, slice(None))
    inner, expert = config.expert_ffn_hidden_size, int(match["expert"])
    parts: dict[str, Place] = {
        "gate": Place(f"{match['moe']}.experts.w13", (expert, slice(0, inner))),
        "up": Place(f"{match['moe']}.experts.w13", (expert, slice(inner, 2 * inner))),
        "down": Place(f"{match['moe']}.experts.w2", expert),
    }
    return parts[match["part"]]
