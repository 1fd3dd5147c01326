"""A GPU as SGLang's MoE layers see one, on a CPU: this package's MoE, and the operators that are in CUDA.

The operators do what csrc/moe/moe_align_kernel.cu and `silu_and_mul` of SGLang 0.5.21 do.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import sglang.kernels.ops.moe.fused_moe_triton_kernels as launches
import sglang.kernels.ops.moe.moe_align_small_numel as small
import sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe as sequence
import sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config as tuned
import torch
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.quantization import fp8
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.runtime_context import get_context, get_parallel
from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.quantization import Quantization
from longcat_sglang import moe, quantization
from longcat_sglang.devices.cuda import kernels as ours
from longcat_sglang.devices.cuda.device import Cuda
from longcat_sglang.model import PACKED
from tests.cases import DEFAULT
from tests.interpreted import Layer

align = sys.modules["sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size"]
"""The module; its package has a function of that name."""
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
TILE = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 1}
Break = Callable[[Any], None]


@dataclass
class Run:
    output: Tensor
    activated: int | None
    """Rows that `silu_and_mul` has computed, if it was called."""


def aligned_by_bucket(
    topk_ids: Tensor,
    num_buckets: int,
    block: int,
    sorted_ids: Tensor,
    expert_ids: Tensor,
    post_padded: Tensor,
    *_: Any,
) -> None:
    """`sgl_moe_align_block_size`: an id's bucket is the next number, so that -1 has the first."""
    bucket = topk_ids.flatten().long() + 1
    counts = torch.bincount(bucket, minlength=num_buckets)
    padded = -(-counts // block) * block
    ends = padded.cumsum(0)
    sorted_ids.fill_(topk_ids.numel())
    post_padded.fill_(int(ends[-1]))
    for number in counts.nonzero().flatten().tolist():
        start, end = int(ends[number] - padded[number]), int(ends[number])
        slots = (bucket == number).nonzero().flatten()
        slots = slots[torch.randperm(len(slots))]  # the order is that of atomics: any
        sorted_ids[start : start + len(slots)] = slots.int()
        expert_ids[start // block : end // block] = number - 1


@contextmanager
def hopper(kernels: bool, rank: int, ranks: int, activated: list[int]) -> Iterator[None]:
    """A rank's process of SGLang, whose user requests our kernels or not."""

    def silu_and_mul(x: Tensor, out: Tensor, expert_ids: Tensor | None = None, expert_step: int = 1) -> None:
        gate, up = x.float().chunk(2, dim=1)
        computed = torch.ones(len(x), dtype=torch.bool)
        if expert_ids is not None:
            computed = expert_ids.repeat_interleave(expert_step)[: len(x)] != -1
        out[computed] = (torch.nn.functional.silu(gate) * up).to(out.dtype)[computed]
        activated.append(int(computed.sum()))

    def sum_of_all(x: Tensor, out: Tensor, scaling: float) -> None:
        out.copy_(x.float().sum(1) * scaling)

    def fused_experts(*given: Any, **named: Any) -> Tensor:
        """What SGLang's operator `outplace_fused_experts` does, which is registered for CUDA alone."""
        return sequence.fused_experts_impl(*given[:7], False, *given[7:], **named)

    def config(*_: Any, return_down_config: bool = False, **__: Any) -> Any:
        return (dict(TILE), (None, None)) if return_down_config else dict(TILE)

    options = {"tp_size": ranks, "ep_size": ranks, "device": "cpu"}
    if kernels:
        options["json_model_override_args"] = json.dumps({"longcat_kernels": True})
    with pytest.MonkeyPatch.context() as patch, get_context().override_server_args(**options):
        patch.setattr(moe.devices, "current", Cuda)
        patch.setattr(quantization.devices, "current", Cuda)
        patch.setattr(moe, "get_device", lambda: "cpu")
        patch.setattr(UnquantizedFusedMoEMethod, "apply", UnquantizedFusedMoEMethod.forward_cuda)
        module: Any
        for module in (sequence, align):
            patch.setattr(module, "_is_cuda", True)
        patch.setattr(fp8, "_is_cpu", False)
        patch.setattr(sequence, "outplace_fused_experts", fused_experts)
        patch.setattr(sequence, "silu_and_mul", silu_and_mul, raising=False)
        patch.setattr(sequence, "moe_sum_reduce", sum_of_all, raising=False)
        patch.setattr(sequence, "moe_sum_reduce_torch_compile", sum_of_all)
        patch.setattr(sequence, "use_symmetric_memory", lambda *_, **__: nullcontext())
        patch.setattr(sequence, "is_allocation_symmetric", lambda: False)
        patch.setattr(sequence, "_moe_support_tma", lambda: False)
        patch.setattr(sequence, "try_get_optimal_moe_config", config)
        patch.setattr(align, "sgl_moe_align_block_size", aligned_by_bucket, raising=False)
        patch.setattr(align, "SMALL_NUMEL_LIMIT", small.SMALL_NUMEL_LIMIT, raising=False)
        patch.setattr(align, "moe_align_small_numel", small.moe_align_small_numel, raising=False)
        for module in (tuned, ours):
            patch.setattr(module, "get_device_name", lambda *_: "NVIDIA X")
        for module in (sequence, launches, small):
            if hasattr(module, "is_arch_support_pdl"):
                patch.setattr(module, "is_arch_support_pdl", lambda: False)
        with get_parallel().override(
            tp_rank=rank, moe_ep_rank=rank, moe_tp_rank=0, tp_group=SimpleNamespace(device_group=None)
        ):
            yield


def config_of(layer: Layer) -> LongcatConfig:
    _, hidden, inner = layer.experts.w2.shape
    return replace(
        DEFAULT,
        hidden_size=hidden,
        expert_ffn_hidden_size=inner,
        n_routed_experts=len(layer.experts.w13),
        zero_expert_num=4,
        moe_topk=layer.routing.ids.shape[1],
        quantization=None if layer.experts.w13_scales is None else Quantization("fp8"),
    )


@contextmanager
def built(layer: Layer, *, kernels: bool, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Any, list[int]]]:
    """This package's MoE with the layer's experts, and the rows that `silu_and_mul` computes, of each call."""
    config, activated, experts = config_of(layer), list[int](), layer.experts.of_rank(rank, ranks)
    with hopper(kernels, rank, ranks, activated):
        published = None if config.quantization is None else fp8.Fp8Config.from_config(FP8)
        default = torch.get_default_dtype()
        torch.set_default_dtype(layer.x.dtype)
        try:
            mlp = moe.LongcatMoE(config, 0, quantization.of_model(published, config, PACKED), "model.layers.0.mlp")
        finally:
            torch.set_default_dtype(default)
        container: Any = mlp.experts
        container.w13_weight.data, container.w2_weight.data = experts.w13, experts.w2
        if experts.w13_scales is not None:
            container.w13_weight_scale_inv.data = experts.w13_scales
            container.w2_weight_scale_inv.data = experts.w2_scales
        container.quant_method.process_weights_after_loading(container)
        assert container.w13_weight.data_ptr() == experts.w13.data_ptr(), "no weight is repacked"
        yield mlp, activated


def computed(layer: Layer, *, kernels: bool, rank: int = 0, ranks: int = 1, broken: Break | None = None) -> Run:
    """By the experts of this package's MoE, as it sets up SGLang's container of them. broken: done to it first."""
    with built(layer, kernels=kernels, rank=rank, ranks=ranks) as (mlp, activated):
        if broken is not None:
            broken(mlp.experts)
        before = layer.x.clone()
        output = mlp.experts(layer.x, StandardTopKOutput(layer.routing.weights, layer.routing.ids, layer.x))
        assert torch.equal(layer.x, before), "the dense branch reads it afterwards"
    return Run(output, sum(activated) if activated else None)
