"""From the options of `vllm serve` to an engine of one rank, its steps, and a report of both."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from typing import NoReturn
from unittest import mock

import torch
import vllm
from vllm import SamplingParams, envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore

from longcat_core.null_gpu.told import text_of, told
from longcat_core.planning.dry_run import Report, Request, Step
from longcat_vllm.dry_run import observe, tracing
from longcat_vllm.dry_run.rank import OneRank, become

TRACED_LAYERS = 2
"""Of the model that is compiled: each layer adds the same operators."""

STEPS = 3
"""The last one decodes, with drafts of the one before it where there are drafts."""

TOLD = ("backend", "Using ", "kernel", "Config file not found", "KV cache", "memory")
"""Words in lines of vLLM's log that tell a choice or its consequence."""


def dry_run(request: Request, gpus: int, gpu_name: str) -> Report:
    """Build the engine and step it, as far as it goes; whatever stops it is in the report."""
    report = Report(request, engine=f"vLLM {vllm.__version__}", machine=f"{gpus} x {gpu_name}")
    with ExitStack() as stack:
        log = stack.enter_context(told(["vllm"], TOLD, but=["Initializing a V1 LLM engine"]))
        stack.enter_context(mock.patch.dict(os.environ, dict(request.environment)))
        envs.disable_envs_cache()
        if not request.is_traced:
            stack.enter_context(tracing.disabled())
        try:
            config = _configured(request)
            _require_gpus(config, gpus)
        except (ValueError, NotImplementedError) as refusal:
            return replace(report, refused=str(refusal), log=tuple(log))
        report = replace(report, choices=observe.configured(config))
        try:
            report = _built(request, config, report)
        except Exception as error:
            if OneRank.latest is not None:
                report = observe.built(report, OneRank.latest)
                report = replace(report, memory=observe.memory(OneRank.latest, cache=None))
            if _is_for_memory(error):
                report = replace(report, does_not_fit=str(error))
            else:
                report = replace(report, failed=text_of(error))
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


def _require_gpus(config: VllmConfig, gpus: int) -> None:
    ranks = config.parallel_config.world_size * config.parallel_config.data_parallel_size
    if ranks > gpus:
        raise ValueError(f"ranks: {ranks}, wanted at most {gpus}, as there are GPUs; give more in --gpus")


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
    while len(executor.executed) < STEPS:
        _, has_executed = core.step_fn()
        core.post_step(has_executed)
    first, last = executor.executed[0], executor.executed[-1]
    return (first.finished("prefill"), last.finished("decode"))


def _is_for_memory(error: Exception) -> bool:
    """vLLM raises ValueErrors where weights leave no room for the cache, or the context more than there is."""
    told = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "cache blocks" in told or "KV cache is needed" in told
