"""The dial of a model that SGLang serves: the mean of FFN experts a token, held by what the forward passes choose."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import torch

from longcat_core.config import LongcatConfig
from longcat_core.dial import DialledRouters, obstacles_to_dial
from longcat_core.observation import shared_target
from longcat_core.target_by_queue import Target
from longcat_sglang import requested

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import SetInternalStateReq
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)
TARGET, LEAST, RESET = "longcat_ffn_experts", "longcat_least_ffn_experts", "longcat_reset_dial"
"""Fields of /set_internal_state, which have to be numbers: another target; the bound to which it falls as the queue
grows; whether to begin anew with the model as published."""
NAME = "ffn_experts"
"""Of the target in what answers a request."""
_EVENT = "data: {"


def obstacles(settings: Any, longcat: LongcatConfig, target: Target) -> list[str]:
    """Why the mean cannot be held at `target` with these options."""
    found = obstacles_to_dial(longcat, target)
    others = "is given, and ranks with other tokens would turn their dials apart; leave it out"
    if settings.enable_dp_attention:
        found.append(f"--enable-dp-attention {others}")
    if settings.dp_size > 1:
        found.append(f"--dp-size {others}")
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
    asked = requested.current()
    if asked.ffn_experts is None:
        return None
    routers = [layer.mlp.router for layer in layers]
    return DialledRouters(config, asked.ffn_experts, routers, torch.get_default_device(), asked.full_queue)


def turn_where_asked(original: Callable[..., Any], scheduler: Scheduler, request: SetInternalStateReq) -> Any:
    """Turn the dial by /set_internal_state, which every rank gets between the same two steps. SGLang answers whether a
    change was made, and has in its log why not."""
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    given = request.server_args
    if given.keys().isdisjoint((TARGET, LEAST, RESET)):
        return original(scheduler, request)
    dialled = _of_scheduler(scheduler)
    try:
        if others := given.keys() - {TARGET, LEAST, RESET}:
            raise ValueError(f"{', '.join(sorted(others))} beside the dial; change it in a request of its own")
        if LEAST in given and TARGET not in given:
            raise ValueError(f"{LEAST} without {TARGET}, which is the other bound; give both")
        if TARGET not in given and not given[RESET]:
            raise ValueError(f"{RESET} is {given[RESET]}, wanted 1")
        if dialled is None:
            raise ValueError(f"there is no dial; start the server with {requested.OPTIONS['ffn_experts']}")
        scheduler.device_module.synchronize()  # all steps before have read the old target, on every rank
        if TARGET in given:
            dialled.turn((given[LEAST], given[TARGET]) if LEAST in given else given[TARGET])
        if given.get(RESET):
            dialled.dial.reset()
    except ValueError as error:
        logger.warning("/set_internal_state: %s", error)
        return SetInternalStateReqOutput(updated=False)
    logger.info("The dial's target is %s FFN experts a token.", dialled.dial.bounds or dialled.dial.target)
    return SetInternalStateReqOutput(updated=True)


def follow_queue(
    original: Callable[..., Any], scheduler: Scheduler, batch: ScheduleBatch, *args: Any, **kwargs: Any
) -> Any:
    """Before a step, with what the scheduler could not put into it: every rank has the same requests and decides alike
    which of them go on, as their batches would not fit together otherwise."""
    dialled = _of_scheduler(scheduler)
    if dialled is not None and not batch.forward_mode.is_prebuilt():  # whose step was made elsewhere
        # Steps before may still read the old target.
        wait = scheduler.device_module.synchronize
        dialled.follow_queue(len(scheduler.waiting_queue), scheduler.max_running_requests, before_turning=wait)
    return original(scheduler, batch, *args, **kwargs)


def name_target_of_answers(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """In the `meta_info` of an answer that is finished, of /generate and of an engine in Python."""
    return _named(original(manager, *args, **kwargs))


async def _named(answers: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[dict[str, Any]]:
    async with aclosing(answers):
        async for answer in answers:
            if answer["meta_info"].get("finish_reason") and (target := shared_target.read()) is not None:
                answer["meta_info"][NAME] = target
            yield answer


async def name_target_of_responses(original: Callable[..., Any], serving: Any, *args: Any, **kwargs: Any) -> Any:
    """In the `metadata` of /v1 responses, beside the version of the weights; in a stream in the event that ends a
    choice, which has no such field otherwise."""
    response = await original(serving, *args, **kwargs)
    metadata, target = getattr(response, "metadata", None), shared_target.read()
    if hasattr(response, "body_iterator"):
        response.body_iterator = _named_events(response.body_iterator)
    elif metadata is not None and target is not None:
        metadata[NAME] = target
    return response


async def _named_events(events: AsyncIterable[Any]) -> AsyncGenerator[Any]:
    async for event in events:
        # Quotation marks in the text of an answer are escaped.
        ends_a_choice = isinstance(event, str) and event.startswith(_EVENT) and '"finish_reason":"' in event
        if ends_a_choice and (target := shared_target.read()) is not None:
            yield f'{_EVENT}"metadata":{json.dumps({NAME: target})},{event.removeprefix(_EVENT)}'
        else:
            yield event


def _of_scheduler(scheduler: Scheduler) -> DialledRouters | None:
    runner: Any = scheduler.tp_worker.model_runner
    dialled: DialledRouters | None = runner.model.model.dialled
    return dialled
