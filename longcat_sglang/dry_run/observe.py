"""What SGLang has chosen and built, read from its arguments and its model runner."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.server_args import ServerArgs
from torch import nn

from longcat_core.planning.dry_run import Memory, Report, grouped


def configured(arguments: ServerArgs) -> dict[str, str]:
    view: Any = resolving_view(arguments)
    return {
        "ranks": f"TP {view.tp_size}, PP {view.pp_size}, DP {view.dp_size}, EP {view.ep_size}",
        "attention": str(view.attention_backend),
        "MoE runner": str(view.moe_runner_backend),
        "all2all backend": str(view.moe_a2a_backend),
        "quantization": str(view.quantization),
        "cache dtype": str(view.kv_cache_dtype),
        "page size": str(view.page_size),
        "tokens in a step": str(view.chunked_prefill_size),
    }


def built(report: Report, runner: Any) -> Report:
    """With what is known once the weights are there."""
    choices = {**report.choices, "architecture": type(runner.model).__name__, "dtype": str(runner.dtype)}
    for module in runner.model.modules():
        if isinstance(module, FusedMoE):
            choices |= dict(_experts(module))
        elif isinstance(module, RadixAttention):
            choices["head of the cache"] = str(module.head_dim)
    return replace(report, choices=choices, tensors=grouped(_rows(runner.model)))


def _experts(experts: Any) -> Iterator[tuple[str, str]]:
    yield "experts", type(experts).__name__
    yield "experts' method", type(experts.quant_method).__name__
    runner = getattr(experts.quant_method, "runner", None)
    if runner is not None:
        yield "experts' runner", str(getattr(runner, "runner_backend", type(runner).__name__))
    yield "dispatcher", type(experts.dispatcher).__name__
    table = getattr(experts.dispatcher, "local_expert_mapping", None)
    yield "expert map", "none" if table is None else f"{tuple(table.shape)} {table.dtype}"
    yield "experts of this rank", str(experts.num_local_experts)


def _rows(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], str, str, int]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), str(tensor.device), tensor.nbytes


def memory(runner: Any) -> Memory:
    """After the cache is there; SGLang measures no activations, but leaves a share of the memory to them."""
    pool = runner.token_to_kv_pool
    total = int(runner_total(runner))
    cache = int(sum(buffer.nbytes for buffer in pool.kv_buffer))
    tokens = int(runner.max_total_num_tokens)
    return Memory(
        total=total,
        requested=int(total * runner.mem_fraction_static),
        weights=sum(tensor.nbytes for tensor in (*runner.model.parameters(), *runner.model.buffers())),
        activations=0,
        cache=cache,
        cache_a_token=round(cache / len(pool.kv_buffer[0])) if len(pool.kv_buffer[0]) else 0,
        cache_tokens=tokens,
    )


def runner_total(runner: Any) -> int:
    import torch

    return torch.cuda.get_device_properties(runner.gpu_id).total_memory
