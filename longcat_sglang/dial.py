"""The dial of a model that SGLang serves: the mean of FFN experts a token, held by what the forward passes choose."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from longcat_core.config import LongcatConfig
from longcat_core.dial import DialledRouters, obstacles_to_dial
from longcat_sglang import requested


def obstacles(settings: Any, longcat: LongcatConfig, target: float) -> list[str]:
    """Why the mean cannot be held at `target` with these options."""
    found = obstacles_to_dial(longcat, target)
    others = "is given, and ranks with other tokens would turn their dials apart; leave it out"
    if settings.enable_dp_attention:
        found.append(f"--enable-dp-attention {others}")
    if settings.moe_a2a_backend != "none":
        found.append(f"--moe-a2a-backend {others}")
    if settings.enable_memory_saver:
        found.append("with --enable-memory-saver its memory comes and goes; leave it out")
    return found


def of_layers(config: LongcatConfig, layers: Iterable[Any]) -> DialledRouters | None:
    """None where none is requested. layers: decoder layers.

    Raises:
        ValueError: for a target that no bias holds.
    """
    target = requested.current().ffn_experts
    if target is None:
        return None
    return DialledRouters(config, target, [layer.mlp.router for layer in layers], torch.get_default_device())
