"""The dial of a model that vLLM serves: the mean of FFN experts a token, held by what the forward passes choose."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from longcat_core import spellings
from longcat_core.config import LongcatConfig
from longcat_core.dial import Dial, DialledRouters, obstacles_to_dial
from longcat_vllm import requested

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")
WORKER_EXTENSION = f"{__name__}.DialOfWorker"
NO_DIAL = {"error": f"there is no dial; start the server with {requested.OPTIONS['ffn_experts']}"}


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


def add_to_workers(vllm_config: VllmConfig) -> None:
    """Let vLLM's /collective_rpc turn the dial."""
    parallel = vllm_config.parallel_config
    if parallel.worker_extension_cls in ("", WORKER_EXTENSION):
        parallel.worker_extension_cls = WORKER_EXTENSION
    else:
        logger.warning("The dial stays at its target: --worker-extension-cls has the place of what would turn it.")


class DialOfWorker:
    """What vLLM adds to the methods of a worker, for /collective_rpc. Every rank runs them between the same two steps.

    They raise nothing: of ranks that raise, vLLM reads the first one's answer, and takes what the others have said for
    answers to the next call (`MultiprocExecutor.collective_rpc`).
    """

    get_model: Callable[[], Any]

    def set_ffn_experts(self, target: Any = None, *_: Any, **others: Any) -> dict[str, Any]:
        """Hold another mean of FFN experts a token. target: a number, as text too; others are of no use.

        Returns the target of the dial, and why it has not changed, if it has not.
        """
        dial = self._dial()
        if dial is None:
            return NO_DIAL
        try:
            dial.turn(target)
        except ValueError as error:
            return {"ffn_experts": dial.target, "error": str(error)}
        logger.info("The dial's target is %g FFN experts a token.", dial.target)
        return {"ffn_experts": dial.target}

    def reset_dial(self, *_: Any, **others: Any) -> dict[str, Any]:
        """Begin anew with the model as published, at the same target, which is returned. Arguments are of no use."""
        dial = self._dial()
        if dial is None:
            return NO_DIAL
        dial.reset()
        logger.info("The dial begins anew, at %g FFN experts a token.", dial.target)
        return {"ffn_experts": dial.target}

    def _dial(self) -> Dial | None:
        """None of a model without one, as vLLM keeps an extension for the models that a process has later."""
        dialled: DialledRouters | None = getattr(self.get_model(), "dialled", None)
        return None if dialled is None else dialled.dial
