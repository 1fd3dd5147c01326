"""The dial of a model that SGLang serves: the mean of FFN experts a token, held by what the forward passes choose."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.dial import Dial, obstacles_to_dial
from longcat_sglang import requested

if TYPE_CHECKING:
    from longcat_sglang.moe import LongcatRouter


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
    return None if target is None else DialledRouters(config, target, [layer.mlp.router for layer in layers])


class DialledRouters:
    """The model's routers and their dial. Ranks of a tensor-parallel group have the same tokens, and so make the same
    choices."""

    def __init__(self, config: LongcatConfig, target: float, routers: Sequence[LongcatRouter]) -> None:
        self.dial = Dial(config, target, len(routers), torch.get_default_device())
        self._routers = routers
        for router in routers:
            router.dialled = torch.zeros_like(router.e_score_correction_bias)

    def begin_step(self) -> None:
        """Write the biases that the routers are to choose by."""
        published = [router.e_score_correction_bias for router in self._routers]
        self.dial.begin_step(published, [router.bias for router in self._routers])

    def end_step(self, ids: Tensor, is_real: Tensor) -> None:
        """ids: int32 [layers, T, K]; is_real: as of `metrics.rows_that_are_tokens`."""
        self.dial.end_step(ids, is_real)
