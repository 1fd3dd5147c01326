"""The dial of a model that vLLM serves: the mean of FFN experts a token, held by what the forward passes choose."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from longcat_core import spellings
from longcat_core.config import LongcatConfig
from longcat_core.dial import DialledRouters, obstacles_to_dial
from longcat_vllm import requested

if TYPE_CHECKING:
    from vllm.config import VllmConfig


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
    if target is None:
        return None
    return DialledRouters(config, target, [layer.mlp.router for layer in layers], torch.get_default_device())
