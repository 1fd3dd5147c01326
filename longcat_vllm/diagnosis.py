"""What `longcat doctor` says of vLLM: its version, what was hooked in this process, what a LongCat model would get."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from longcat_core.config import LongcatConfig
from longcat_core.diagnosis import Finding, checkpoint_findings, hook_findings, version_of
from longcat_vllm.engine import VLLM
from longcat_vllm.hooks import HOOKS

if TYPE_CHECKING:
    import torch


def diagnose(checkpoint: Path | None = None) -> list[Finding]:
    """Findings in order of importance. `checkpoint`: a directory to check as well, and to choose kernels for.

    Loads vLLM's plugins in this process, as any vLLM process does.
    """
    findings = [version_of(VLLM)]
    if findings[0].problem:
        return findings
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    findings += _hooks()
    findings.append(_platform())
    if checkpoint is not None:
        findings += checkpoint_findings(checkpoint)
    if not any(finding.problem for finding in findings):
        findings += _implementations(checkpoint)
    return findings


def _hooks() -> list[Finding]:
    plugins = os.environ.get("VLLM_PLUGINS")
    is_left_out = plugins is not None and "longcat" not in plugins.split(",")
    left_out = f"VLLM_PLUGINS={plugins!r} leaves the plugin out; unset it or add 'longcat'" if is_left_out else ""
    return hook_findings(VLLM, HOOKS, "longcat_vllm", "vllm.general_plugins", left_out)


def _platform() -> Finding:
    from vllm.platforms import current_platform

    return Finding("platform", f"{type(current_platform).__module__}.{type(current_platform).__qualname__}")


def _implementations(directory: Path | None) -> list[Finding]:
    import torch
    from vllm.platforms import current_platform

    from longcat_core import checkpoint

    config = checkpoint.read_config(directory) if directory is not None else None
    if not current_platform.is_cpu():
        from longcat_vllm.moe import SKIP_ZERO_EXPERTS

        attention, experts = engine_choice(config, torch.bfloat16)
        kernel = experts if experts in SKIP_ZERO_EXPERTS else f"TritonExperts instead of vLLM's choice, {experts},"
        return [
            Finding("attention", f"{attention} in bfloat16, unless --attention-backend says otherwise"),
            Finding("MoE", f"{kernel} in bfloat16, unless --moe-backend says otherwise; zero experts as id -1"),
        ]

    from longcat_vllm.attention import LatentAttentionBackend
    from longcat_vllm.cpu_experts import select_cpu_kernel

    backend = f"{LatentAttentionBackend.__module__}.{LatentAttentionBackend.__qualname__}"
    hidden, inner = (config.hidden_size, config.expert_ffn_hidden_size) if config is not None else _PUBLISHED_EXPERT
    kernels = [
        f"{select_cpu_kernel(hidden, inner, dtype)} in {str(dtype).removeprefix('torch.')}"
        for dtype in (torch.bfloat16, torch.float32)
    ]
    return [
        Finding("attention", f"{backend}: any sizes, chunked prefill, prefix caching"),
        Finding("MoE", f"rows of FFN experts only; {', '.join(kernels)}"),
    ]


def engine_choice(config: LongcatConfig | None, dtype: torch.dtype) -> tuple[str, str]:
    """vLLM's own attention backend and MoE kernel for one rank; without a configuration, LongCat-Flash-Chat's sizes."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import select_unquantized_moe_backend
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import get_attn_backend

    hidden, inner = (config.hidden_size, config.expert_ffn_hidden_size) if config is not None else _PUBLISHED_EXPERT
    experts, top_k = (config.n_routed_experts, config.moe_topk) if config is not None else (512, 12)
    latent, heads = (config.latent_dim, config.num_attention_heads) if config is not None else (576, 64)
    with set_current_vllm_config(VllmConfig()):
        attention = get_attn_backend(latent, dtype, "auto", use_mla=True, num_heads=heads)
        backend, kernel = select_unquantized_moe_backend(
            FusedMoEConfig(
                num_experts=experts,
                experts_per_token=top_k,
                hidden_dim=hidden,
                intermediate_size=inner,
                num_local_experts=experts,
                num_logical_experts=experts,
                activation=MoEActivation.SILU,
                device=current_platform.device_type,
                routing_method=RoutingMethodType.Unspecified,
                moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
                in_dtype=dtype,
            )
        )
    return attention.get_name(), kernel.__name__ if kernel is not None else backend.value


_PUBLISHED_EXPERT = (6144, 2048)
"""Hidden and expert sizes of LongCat-Flash-Chat."""
