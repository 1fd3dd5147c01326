"""The dial of a model that vLLM serves: the mean of FFN experts a token, held by what the forward passes choose."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longcat_core import spellings
from longcat_core.config import LongcatConfig
from longcat_core.dial import Dial, obstacles_to_dial
from longcat_vllm import requested

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from longcat_vllm.moe import LongcatRouter


def obstacles(vllm_config: VllmConfig, target: float) -> list[str]:
    """Why the mean cannot be held at `target` with these options."""
    parallel = vllm_config.parallel_config
    found = obstacles_to_dial(spellings.read(vllm_config.model_config.hf_config), target)
    found += [
        f"{option} is {size}, wanted 1, as ranks with other tokens would turn their dials apart; leave it out"
        for option, size in {
            "data_parallel_size": parallel.data_parallel_size,
            "decode_context_parallel_size": parallel.decode_context_parallel_size,
            "prefill_context_parallel_size": parallel.prefill_context_parallel_size,
        }.items()
        if size > 1
    ]
    if parallel.use_ubatching:
        found.append("microbatches run at the same time, and would turn one dial; leave --enable-dbo out")
    if vllm_config.model_config.enable_sleep_mode:
        found.append("with enable_sleep_mode its memory comes and goes; leave it out")
    return found


def of_layers(vllm_config: VllmConfig, config: LongcatConfig, layers: Iterable[Any]) -> DialledRouters | None:
    """None where none is requested. layers: decoder layers.

    Raises:
        ValueError: for a target that no bias holds.
    """
    target = requested.of(vllm_config).ffn_experts
    return None if target is None else DialledRouters(config, target, [layer.mlp.router for layer in layers])


class DialledRouters:
    """This rank's routers and their dial. Ranks of a tensor-parallel group have the same tokens, and so make the same
    choices; a stage of a pipeline has a dial for its own layers."""

    def __init__(self, config: LongcatConfig, target: float, routers: Sequence[LongcatRouter]) -> None:
        self.dial = Dial(config, target, len(routers), torch.get_default_device())
        self._routers = routers
        for router in routers:
            router.dialled = torch.zeros_like(router.e_score_correction_bias)

    def begin_step(self) -> None:
        """Write the biases that the routers are to choose by."""
        published = [router.e_score_correction_bias for router in self._routers]
        self.dial.begin_step(published, [router.bias for router in self._routers])

    def end_step(self, ids: Tensor, is_real: Tensor | None) -> None:
        """ids: int32 [layers, T, K]; is_real: as of `metrics.rows_that_are_tokens`."""
        if is_real is not None:
            self.dial.end_step(ids[:, : len(is_real)], is_real)
