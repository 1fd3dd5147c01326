"""What vLLM has chosen and built, read from its configuration and its worker."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.v1.kv_cache_interface import KVCacheConfig

from longcat_core.planning.dry_run import Memory, Report, Tensors, grouped
from longcat_vllm.dry_run.rank import OneRank


def configured(config: VllmConfig) -> dict[str, str]:
    parallel, compilation = config.parallel_config, config.compilation_config
    return {
        "architecture": ", ".join(config.model_config.hf_config.architectures or ()),
        "model runner": "V2" if config.use_v2_model_runner else "V1",
        "dtype": str(config.model_config.dtype),
        "quantization": str(config.model_config.quantization),
        "ranks": f"TP {parallel.tensor_parallel_size}, PP {parallel.pipeline_parallel_size}, "
        f"DP {parallel.data_parallel_size}, experts {'spread' if parallel.enable_expert_parallel else 'split'}",
        "all2all backend": parallel.all2all_backend if parallel.enable_expert_parallel else "none",
        "compilation": compilation.mode.name if compilation.mode is not None else "",
        "CUDA graphs": compilation.cudagraph_mode.name if compilation.cudagraph_mode is not None else "",
        "tokens in a step": str(config.scheduler_config.max_num_batched_tokens),
        "context": str(config.model_config.max_model_len),
    }


def worker_of(executor: OneRank) -> Any:
    """vLLM's worker, whose attributes are those of a GPU's."""
    return executor.driver_worker.worker


def models(executor: OneRank) -> Iterator[tuple[str, nn.Module]]:
    """The target's, and the drafter's if there is one, each with what its names begin with."""
    runner: Any = worker_of(executor).model_runner
    yield "", runner.get_model()
    for holder in ("drafter", "speculator"):
        drafter = getattr(getattr(runner, holder, None), "model", None)
        if isinstance(drafter, nn.Module):
            yield "drafter.", drafter


def built(report: Report, executor: OneRank) -> Report:
    """With what is known once the weights are there."""
    choices = dict(report.choices)
    for prefix, model in models(executor):
        choices |= {f"{prefix}{name}": value for name, value in _chosen(model).items()}
    return replace(report, choices=choices, tensors=_tensors(executor))


def _chosen(model: nn.Module) -> dict[str, str]:
    found: dict[str, list[str]] = {}

    def add(name: str, value: str) -> None:
        if value not in found.setdefault(name, []):
            found[name].append(value)

    for module in model.modules():
        if isinstance(module, MLAAttention):
            add("attention", f"{module.get_attn_backend().get_name()} ({type(module.impl).__name__})")
            add("cache dtype", module.kv_cache_dtype)
        elif isinstance(module, RoutedExperts):
            for name, value in _experts(module):
                add(name, value)
        elif isinstance(module, LinearBase):
            add("linear", _linear(module))
    return {name: ", ".join(values) for name, values in found.items()}


def _experts(experts: RoutedExperts) -> Iterator[tuple[str, str]]:
    method = experts.quant_method
    kernel = getattr(method, "moe_kernel", None)
    yield "experts", (getattr(method, "experts_cls", None) or type(method)).__name__
    yield "experts' method", type(method).__name__
    if kernel is not None:
        yield "dispatch and combine", type(kernel.prepare_finalize).__name__
    expert_map = experts.expert_map
    yield "expert map", "none" if expert_map is None else f"{tuple(expert_map.shape)} {expert_map.dtype}"
    yield "experts of this rank", str(experts.local_num_experts)


def _linear(layer: LinearBase) -> str:
    method: Any = layer.quant_method
    kernel = getattr(method, "fp8_linear", None) or getattr(method, "kernel", None)
    return type(method).__name__ + (f" ({type(kernel).__name__})" if kernel is not None else "")


def _tensors(executor: OneRank) -> tuple[Tensors, ...]:
    seen = set[int]()

    def rows() -> Iterator[tuple[str, tuple[int, ...], str, str, int]]:
        for prefix, model in models(executor):
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    dtype = str(tensor.dtype).removeprefix("torch.")
                    yield prefix + name, tuple(tensor.shape), dtype, str(tensor.device), tensor.nbytes

    return grouped(rows())


def memory(executor: OneRank, cache: KVCacheConfig | None) -> Memory | None:
    """After profiling, of which the worker keeps the results; None before."""
    worker = worker_of(executor)
    if not hasattr(worker, "available_kv_cache_memory_bytes"):
        return None
    specs = worker.get_kv_cache_spec().values()
    a_token = sum(spec.page_size_bytes / spec.block_size for spec in specs)
    blocks = cache.num_blocks if cache is not None else 0
    return Memory(
        total=worker.init_snapshot.total_memory,
        requested=int(worker.requested_memory),
        weights=int(worker.model_runner.model_memory_usage),
        activations=int(worker.peak_activation_memory),
        cache=int(worker.available_kv_cache_memory_bytes),
        cache_a_token=round(a_token),
        cache_tokens=blocks * min((spec.block_size for spec in specs), default=0),
    )
