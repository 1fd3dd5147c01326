"""A GPU as vLLM's MoE layers see one, on a CPU: its platform, the operators of its MoE that are in CUDA, and a layer.

The operators do what csrc/libtorch_stable/moe/moe_align_sum_kernels.cu of vLLM 0.32 does.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longcat_core.plugin.requested import Requested
from tests.interpreted import Layer

DEVICE = "NVIDIA X"


def turn_triton_on() -> None:
    """Before anything else of vLLM is imported. The CPU's platform loads the operators that this CPU can run."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that vLLM tolerates that no driver is active
    from vllm import platforms

    assert platforms.current_platform.is_cpu()
    matches = platforms.vllm_version_matches_substr
    platforms.vllm_version_matches_substr = lambda _: False  # "cpu" in the version turns Triton off
    from vllm import triton_utils

    platforms.vllm_version_matches_substr = matches
    assert triton_utils.HAS_TRITON


def local_experts(ids: Tensor, expert_map: Tensor | None, num_experts: int) -> Tensor:
    """`get_local_expert_id`: -1 for what is out of range, or another rank's."""
    is_expert = (ids >= 0) & (ids < num_experts)
    chosen = ids.clamp(0, num_experts - 1).long()
    local = chosen if expert_map is None else expert_map[chosen].long()
    return torch.where(is_expert, local, -1)


def moe_align_block_size(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    expert_map: Tensor | None = None,
    scatter_idx: Tensor | None = None,
) -> None:
    local = local_experts(topk_ids.flatten(), expert_map, num_experts)
    counts = torch.bincount(local[local >= 0], minlength=num_experts)
    padded = -(-counts // block_size) * block_size
    ends = padded.cumsum(0)
    sorted_token_ids.fill_(topk_ids.numel())
    experts_ids.fill_(-1)
    num_tokens_post_pad.fill_(int(ends[-1]))
    for expert in counts.nonzero().flatten().tolist():
        start, end = int(ends[expert] - padded[expert]), int(ends[expert])
        slots = (local == expert).nonzero().flatten()
        slots = slots[torch.randperm(len(slots))]  # the order is that of atomics: any
        sorted_token_ids[start : start + len(slots)] = slots.int()
        experts_ids[start // block_size : end // block_size] = expert


def moe_sum(outputs: Tensor, result: Tensor, topk_ids: Tensor | None = None, expert_map: Tensor | None = None) -> None:
    """Rows of other choices are not read: NaN in them does not reach the sum."""
    if topk_ids is not None:
        is_skipped = local_experts(topk_ids, expert_map, 1 << 30 if expert_map is None else len(expert_map)) < 0
        outputs = outputs.masked_fill(is_skipped.unsqueeze(-1), 0.0)
    result.copy_(outputs.float().sum(1))


_LIBRARY = torch.library.Library("_moe_C", "FRAGMENT")
_LIBRARY.define(
    "moe_align_block_size(Tensor topk_ids, int num_experts, int block_size, Tensor! sorted_token_ids, "
    "Tensor! experts_ids, Tensor! num_tokens_post_pad, Tensor? expert_map=None, Tensor? scatter_idx=None) -> ()"
)
_LIBRARY.define("moe_sum(Tensor input, Tensor! output, Tensor? topk_ids=None, Tensor? expert_map=None) -> ()")
_LIBRARY.impl("moe_align_block_size", moe_align_block_size, "CPU")
_LIBRARY.impl("moe_sum", moe_sum, "CPU")


@contextmanager
def hopper(requested: Requested) -> Iterator[None]:
    """vLLM's platform says that it is one, and a model is built whose user requests this."""
    from vllm import distributed
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import fused_moe
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability, PlatformEnum
    from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

    from longcat_vllm import requested as room

    config = VllmConfig()
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(config):
        platform = type(current_platform)
        patch.setattr(platform, "_enum", PlatformEnum.CUDA)
        patch.setattr(platform, "get_device_name", classmethod(lambda *_: DEVICE))
        patch.setattr(platform, "get_device_capability", classmethod(lambda *_, **__: DeviceCapability(9, 0)))
        patch.setattr(platform, "supports_fp8", classmethod(lambda _: True))
        patch.setattr(fused_moe, "get_device_name_as_file_name", lambda *_: DEVICE)
        patch.setattr(room, "current", lambda: requested)
        patch.setattr(distributed, "get_tensor_model_parallel_world_size", lambda: 1)
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        init_workspace_manager(torch.device("cpu"))
        try:
            yield
        finally:
            reset_workspace_manager()


@dataclass
class Run:
    output: Tensor
    rows: Tensor
    """[T, K, H]: what the second product has written."""


def computed(layer: Layer, requested: Requested, rank: int = 0, ranks: int = 1, has_map: bool = True) -> Run:
    """By the method that this package's CUDA device gives vLLM's container of experts, through vLLM's modular kernel.

    has_map: whether a rank with all experts has the map that the device gives it; its memory is full of NaN before.
    """
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod

    from longcat_vllm.devices.cuda.device import Cuda

    experts, is_fp8 = layer.experts.of_rank(rank, ranks), layer.experts.w13_scales is not None
    num_experts, local = len(layer.experts.w13), len(experts.w13)
    _, hidden, inner = experts.w2.shape
    parallel = replace(FusedMoEParallelConfig.make_no_parallel(), ep_size=ranks, ep_rank=rank, use_ep=ranks > 1)
    moe_config = FusedMoEConfig(
        num_experts=num_experts,
        experts_per_token=layer.routing.ids.shape[1],
        hidden_dim=hidden,
        intermediate_size=inner,
        num_local_experts=local,
        num_logical_experts=num_experts,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Unspecified,
        moe_parallel_config=parallel,
        in_dtype=layer.x.dtype,
    )
    with hopper(requested):
        container: Any = nn.Module()
        container.moe_config, container.activation = moe_config, MoEActivation.SILU
        container.apply_router_weight_on_input, container.global_num_experts = False, num_experts
        container._expert_routing_tables = lambda: None
        container.expert_map = layer.expert_map(rank, ranks) if ranks > 1 else Cuda().expert_map(num_experts, "cpu")
        if not has_map:
            container.expert_map = None

        def choose() -> Any:
            if not is_fp8:
                return UnquantizedFusedMoEMethod(moe_config)
            return Fp8MoEMethod(Fp8Config(True, "dynamic", weight_block_size=[128, 128]), container)

        method: Any = Cuda().experts_method(choose, moe_config, is_fp8)
        method.create_weights(container, local, hidden, inner, layer.x.dtype)
        container.w13_weight.data, container.w2_weight.data = experts.w13, experts.w2
        if is_fp8:
            container.w13_weight_scale_inv.data = experts.w13_scales
            container.w2_weight_scale_inv.data = experts.w2_scales
        method.process_weights_after_loading(container)
        assert container.w13_weight.data_ptr() == experts.w13.data_ptr(), "no weight is repacked"
        memory = spied(method.moe_kernel.fused_experts)
        output = method.apply(container, layer.x, layer.routing.weights, layer.routing.ids, None, None)
    rows = memory.workspace2.flatten()[: layer.routing.ids.numel() * hidden].view(*layer.routing.ids.shape, hidden)
    return Run(output, rows)


def spied(experts: Any) -> SimpleNamespace:
    """The memory that vLLM gives them at their next call, full of NaN."""
    memory, apply = SimpleNamespace(), experts.apply

    def noting(**given: Any) -> Any:
        for name in ("workspace13", "workspace2", "output"):
            setattr(memory, name, given[name].fill_(float("nan")))
        return apply(**given)

    experts.apply = noting
    return memory
