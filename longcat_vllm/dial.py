"""The dial of a model that vLLM serves: the mean of FFN experts a token, held by what the forward passes choose."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from vllm import envs
from vllm.logger import init_logger

from longcat_core import spellings
from longcat_core.config import LongcatConfig
from longcat_core.dial import DialledRouters, obstacles_to_dial
from longcat_core.observation import shared_target
from longcat_core.target_by_queue import Target
from longcat_vllm import requested
from longcat_vllm.engine import is_longcat

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_worker import Worker

logger = init_logger(f"vllm.{__name__}")
WORKER_EXTENSION = f"{__name__}.DialOfWorker"
NO_DIAL = {"error": f"there is no dial; start the server with {requested.OPTIONS['ffn_experts']}"}


def obstacles(vllm_config: VllmConfig, target: Target) -> list[str]:
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
    if requested.of(vllm_config).follows_queue:
        found += _obstacles_to_queue(vllm_config)
    return found


def _obstacles_to_queue(vllm_config: VllmConfig) -> list[str]:
    found, scheduler = [], vllm_config.scheduler_config.scheduler_cls
    if scheduler is not None:
        found.append(
            f"scheduler_cls is {scheduler!r}, wanted none for two bounds, as ours says what waits; leave it out"
        )
    is_ray = vllm_config.parallel_config.distributed_executor_backend == "ray"
    if is_ray and not envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND:
        found.append(  # whose graph calls the model's runner and not the worker
            "the older executor for Ray tells no worker what waits; unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND"
        )
    return found


def of_layers(vllm_config: VllmConfig, config: LongcatConfig, layers: Iterable[Any]) -> DialledRouters | None:
    """None where none is requested. layers: decoder layers.

    Raises:
        ValueError: for a target that no bias holds.
    """
    asked = requested.of(vllm_config)
    if asked.ffn_experts is None:
        return None
    routers = [layer.mlp.router for layer in layers]
    return DialledRouters(config, asked.ffn_experts, routers, torch.get_default_device(), asked.full_queue)


def follow_queue(
    original: Callable[..., Any], worker: Worker, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
) -> Any:
    """Before a step, with what the scheduler could not put into it, as it says in what every rank gets of the step."""
    waiting: int | None = getattr(scheduler_output, "longcat_waiting", None)
    if waiting is not None and scheduler_output.total_num_scheduled_tokens:
        model: Any = worker.get_model()
        model.dialled.follow_queue(waiting, worker.scheduler_config.max_num_seqs)
    return original(worker, scheduler_output, *args, **kwargs)


def add_to_workers(vllm_config: VllmConfig) -> None:
    """Let vLLM's /collective_rpc turn the dial."""
    parallel = vllm_config.parallel_config
    if parallel.worker_extension_cls in ("", WORKER_EXTENSION):
        parallel.worker_extension_cls = WORKER_EXTENSION
    else:
        logger.warning("No request turns the dial: --worker-extension-cls has the place of what would.")


class FingerprintWithTarget:
    """The `system_fingerprint` of what answers requests: vLLM's, and behind it the target as a response is finished."""

    def __set__(self, serving: Any, fingerprint: str | None) -> None:
        vars(serving)["system_fingerprint"] = fingerprint

    def __get__(self, serving: Any, kind: type | None = None) -> Any:
        if serving is None:  # asked of the class
            return self
        try:
            fingerprint: str | None = vars(serving)["system_fingerprint"]
        except KeyError:
            raise AttributeError("system_fingerprint") from None
        if fingerprint is None or not is_longcat(getattr(serving, "model_config", None)):
            return fingerprint
        target = shared_target.read()
        return fingerprint if target is None else f"{fingerprint}-ffn{target:g}"


class DialOfWorker:
    """What vLLM adds to the methods of a worker, for /collective_rpc. Every rank runs them between the same two steps.

    They raise nothing: of ranks that raise, vLLM reads the first one's answer, and takes what the others have said for
    answers to the next call (`MultiprocExecutor.collective_rpc`).
    """

    get_model: Callable[[], Any]
    vllm_config: VllmConfig

    def set_ffn_experts(self, *targets: Any, **others: Any) -> dict[str, Any]:
        """Hold another mean of FFN experts a token. targets: a number, as text too; or two, between which the mean
        follows the queue. others: of no use.

        Returns the target of the dial, its bounds if it has any, and why it has not changed, if it has not.
        """
        dialled = self._dialled()
        if dialled is None:
            return NO_DIAL
        given = targets[0] if len(targets) == 1 else targets
        try:
            if isinstance(given, list | tuple) and not requested.of(self.vllm_config).follows_queue:
                raise ValueError(f"{given}, wanted a number, as nobody says here what waits; start the server with two")
            dialled.turn(given)
        except ValueError as error:
            return _said_of(dialled) | {"error": str(error)}
        return _logged("The dial is turned: %s.", dialled)

    def reset_dial(self, *_: Any, **others: Any) -> dict[str, Any]:
        """Begin anew with the model as published, at the same target or bounds, which are returned. Arguments are of no
        use."""
        dialled = self._dialled()
        if dialled is None:
            return NO_DIAL
        dialled.dial.reset()
        return _logged("The dial begins anew: %s.", dialled)

    def _dialled(self) -> DialledRouters | None:
        """None of a model without one, as vLLM keeps an extension for the models that a process has later."""
        return getattr(self.get_model(), "dialled", None)


def _said_of(dialled: DialledRouters) -> dict[str, Any]:
    dial = dialled.dial
    return {"ffn_experts": dial.target} | ({} if dial.bounds is None else {"bounds": list(dial.bounds)})


def _logged(text: str, dialled: DialledRouters) -> dict[str, Any]:
    said = _said_of(dialled)
    logger.info(text, said)
    return said
