"""From the options of SGLang's server to a model runner of one rank, its steps, and a report of both."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import sglang
import torch
from sglang.benchmark import one_batch
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import bootstrap, parallel_state
from sglang.srt.layers.moe import initialize_moe_config
from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.runner_utils.capture_mode import model_capture_mode
from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank
from sglang.srt.server_args import prepare_server_args

from longcat_core.null_gpu import world
from longcat_core.null_gpu.steps import Executed, counting
from longcat_core.null_gpu.told import text_of, told
from longcat_core.planning.dry_run import Report, Request, Step
from longcat_sglang.dry_run import kernels, observe

TOLD = ("backend", "Using ", "kernel", "KV Cache", "KV cache", "memory", "Memory")
"""Words in lines of SGLang's log that tell a choice or its consequence."""
FORCED = ("--load-format", "dummy", "--skip-tokenizer-init", "--device", "cuda", "--disable-cuda-graph")
"""Options of every dry run: steps are counted as they are written, without graphs."""


def dry_run(request: Request, gpus: int, gpu_name: str) -> Report:
    """Build the model runner and step it, as far as it goes; whatever stops it is in the report."""
    report = Report(request, engine=f"SGLang {sglang.__version__}", machine=f"{gpus} x {gpu_name}")
    kernels.install()
    with ExitStack() as stack:
        log = stack.enter_context(told(["sglang", "longcat_sglang"], TOLD))
        stack.enter_context(mock.patch.dict(os.environ, dict(request.environment)))
        try:
            arguments = prepare_server_args(["--model-path", request.model, *FORCED, *request.options])
            _require_gpus(arguments, gpus)
            arguments.resolve_once()
        except (ValueError, NotImplementedError, SystemExit) as refusal:
            return replace(report, refused=str(refusal), log=tuple(log))
        report = replace(report, choices=observe.configured(arguments))
        try:
            report = _built(request, arguments, report)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or "GPU memory" in str(error):
                report = replace(report, does_not_fit=str(error))
            else:
                report = replace(report, failed=text_of(error))
        return replace(report, log=tuple(log))


def _require_gpus(arguments: Any, gpus: int) -> None:
    if (ranks := _ranks(arguments)) > gpus:
        raise ValueError(f"ranks: {ranks}, wanted at most {gpus}, as there are GPUs; give more in --gpus")


def _ranks(arguments: Any) -> int:
    """Data-parallel attention is among the tensor-parallel ranks."""
    return int(arguments.tp_size * arguments.pp_size)


def _built(request: Request, arguments: Any, report: Report) -> Report:
    world.join_groups_of(parallel_state, request.rank, _ranks(arguments))
    rank = spawn_world_rank(arguments, tp_rank=request.rank, pp_rank=0)
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=request.rank))
    initialize_moe_config()
    initialize_fp8_gemm_config()
    model = ModelConfig.from_server_args(arguments)
    bootstrap.init_parallel_runtime(server_args=arguments, device="cuda", dist_port=0)
    bootstrap.init_layer_runtime(model_config=model)
    view: Any = resolving_view(arguments)
    runner = ModelRunner(
        model_config=model,
        mem_fraction_static=view.mem_fraction_static,
        gpu_id=request.rank,
        nccl_port=0,
        server_args=arguments,
    )
    report = observe.built(report, runner)
    runner.alloc_memory_pool()
    runner.init_attention_backends()
    runner.init_cuda_graphs()
    report = replace(report, memory=observe.memory(runner))
    return replace(report, steps=_stepped(runner, request))


def _stepped(runner: Any, request: Request) -> tuple[Step, ...]:
    """As SGLang's own benchmark of one batch: a step of all prompts, and one of decoding, of which SGLang makes a CUDA
    graph. It is run as for that, without the graph."""
    length = max(request.prompt_tokens // request.requests, 1)
    stepped = one_batch._TorchBenchRunner(runner)

    def prompts() -> Any:
        return one_batch.prepare_synthetic_inputs_for_latency_test(request.requests, length)

    stepped.extend(prompts())  # the first one compiles kernels, some by launching them
    prefill = Executed(length * request.requests, request.requests)
    with counting(prefill, runner.model):
        tokens, _, batch = stepped.extend(prompts())
    decode = Executed(request.requests, request.requests)
    with counting(decode, runner.model), model_capture_mode():
        stepped.decode(torch.ones_like(tokens), batch)
    return (prefill.finished("prefill"), decode.finished("decode"))
