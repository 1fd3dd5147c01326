"""From the options of `vllm serve` to an engine of one rank, its steps, and a report of both."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from vllm import SamplingParams, envs
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore

from longcat_core.planning.dry_run import Report, Request, Step
from longcat_vllm.dry_run import observe, tracing
from longcat_vllm.dry_run.rank import OneRank, become

TRACED_LAYERS = 2
"""Of the model that is compiled: each layer adds the same operators."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SKIP_P2P_CHECK": "1",  # which copies between GPUs in processes of its own
}
_TOLD = ("backend", "Using ", "kernel", "Config file not found", "KV cache", "memory")
"""Words in lines of vLLM's log that tell a choice or its consequence."""


def dry_run(request: Request, machine: str) -> Report:
    """Build the engine and step it, as far as it goes; whatever stops it is in the report."""
    os.environ.update(ENVIRONMENT)
    envs.disable_envs_cache()
    report = Report(request, engine="vLLM", machine=machine)
    with ExitStack() as stack:
        log = stack.enter_context(_logged())
        stack.callback(_leave)
        if not request.is_traced:
            stack.enter_context(tracing.disabled())
        try:
            config = _configured(request)
        except (ValueError, NotImplementedError) as refusal:
            return replace(report, refused=_text(refusal), log=tuple(log))
        report = replace(report, choices=observe.configured(config))
        try:
            report = _built(request, config, report)
        except Exception as error:
            if OneRank.latest is not None:
                report = observe.built(report, OneRank.latest)
            report = replace(report, **{_kind_of(error): _text(error)})
        return replace(report, log=tuple(log))


def _configured(request: Request) -> VllmConfig:
    """
    Raises:
        ValueError: what vLLM's parser, vLLM's configuration or our `deployment.check` refuses.
    """
    parser = make_arg_parser(FlexibleArgumentParser())
    parser.error = _refuse  # type: ignore[method-assign]  # which would end the process
    arguments = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", request.model, *request.options]))
    arguments.load_format = "dummy"
    arguments.skip_tokenizer_init = True
    arguments.distributed_executor_backend = OneRank
    arguments.enforce_eager = not request.is_traced
    if request.is_traced:
        arguments.compilation_config.backend = "eager"
        arguments.compilation_config.cudagraph_capture_sizes = [1, 8]
        given = arguments.hf_overrides if isinstance(arguments.hf_overrides, dict) else {}
        arguments.hf_overrides = {**given, "num_layers": TRACED_LAYERS}
    return arguments.create_engine_config()


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _built(request: Request, config: VllmConfig, report: Report) -> Report:
    parallel = config.parallel_config
    OneRank.latest = None
    become(request.rank, parallel.world_size, parallel.world_size * parallel.data_parallel_size)
    if request.is_traced:
        with tracing.graphs() as graphs:
            core = EngineCore(config, OneRank, log_stats=False)
        return replace(observe.built(report, _executor(core)), graphs=tuple(graphs))
    core = EngineCore(config, OneRank, log_stats=False)
    executor = _executor(core)
    cache = core.scheduler.kv_cache_config  # type: ignore[attr-defined]
    report = replace(observe.built(report, executor), memory=observe.memory(executor, cache))
    return replace(report, steps=_stepped(core, executor, request))


def _executor(core: EngineCore) -> OneRank:
    assert isinstance(core.model_executor, OneRank)
    return core.model_executor


def _stepped(core: EngineCore, executor: OneRank, request: Request) -> tuple[Step, ...]:
    """A step in which all requests' prompts are computed, and one of decoding."""
    length = max(request.prompt_tokens // request.requests, 1)
    for i in range(request.requests):
        prompt, _ = core.preprocess_add_request(
            EngineCoreRequest(
                request_id=str(i),
                prompt_token_ids=[(7 * i + position) % 1000 + 10 for position in range(length)],  # no common prefix
                mm_features=None,
                sampling_params=SamplingParams(max_tokens=64, temperature=0, ignore_eos=True),
                pooling_params=None,
                arrival_time=0.0,
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            )
        )
        core.add_request(prompt)
    executor.executed.clear()
    for _ in range(16):
        _, has_executed = core.step_fn()
        core.post_step(has_executed)
        decoding = [step for step in executor.executed if step.requests == request.requests and step.tokens < length * step.requests]
        if len(decoding) > 1:
            break
    first = executor.executed[0]
    return (observe.step("prefill", first), observe.step("decode", decoding[-1]))


def _kind_of(error: Exception) -> str:
    """The field of the report that tells it."""
    if isinstance(error, torch.OutOfMemoryError) or "cache blocks" in str(error) or "KV cache is needed" in str(error):
        return "does_not_fit"
    return "failed"


def _text(error: Exception) -> str:
    where = "" if isinstance(error, (ValueError, torch.OutOfMemoryError)) else "".join(traceback.format_tb(error.__traceback__)[-4:])
    return f"{type(error).__name__}: {error}\n{where}".strip()


@contextmanager
def _logged() -> Iterator[list[str]]:
    """Lines of vLLM's log that tell a choice, and all warnings."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if record.levelno >= logging.WARNING or any(word in message for word in _TOLD):
                if message not in lines and not message.startswith("Initializing a V1 LLM engine"):
                    lines.append(message)

    handler, logger = Lines(), logging.getLogger("vllm")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def _leave() -> None:
    """Give the device's memory back, so that another deployment can be built in this process."""
    OneRank.latest = None
    cleanup_dist_env_and_memory()
    if dist.is_initialized():
        dist.destroy_process_group()
    torch._dynamo.reset()
