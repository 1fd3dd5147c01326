"""A CPU: our MLA over SGLang's paged cache, and core's packed experts over rows of FFN experts only."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from longcat_core.config import LongcatConfig
from longcat_core.kernels.cpu.routing import route
from longcat_core.layers.routing import RouterFunctions
from longcat_core.plugin.diagnosis import Finding
from longcat_core.plugin.engine import unsupported_cpu_cache
from longcat_core.weights.precision import Fp8Kernels
from longcat_sglang.devices.base import Device
from longcat_sglang.devices.branch import InARow
from longcat_sglang.engine import CPU_ATTENTION, MTP_ALGORITHMS, algorithm_of, drafts_with_mtp

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.utils import BumpAllocator
    from torch import Tensor, dtype, nn

    from longcat_sglang.attention import LongcatAttention
    from longcat_sglang.devices.base import Angles
    from longcat_sglang.ffn import LongcatFFN
    from longcat_sglang.model import LongcatModel
    from longcat_sglang.mtp import LongcatMTPModel
    from longcat_sglang.quantization import LongcatFp8Config


class Cpu(Device):
    attention_backend = CPU_ATTENTION
    runs_own_class = False

    def prepare_process(self) -> None:
        from longcat_sglang.devices.cpu.platform import bind_rank_to_its_cores

        bind_rank_to_its_cores()

    def rotary_embedding(self, config: LongcatConfig) -> None:
        return None

    def angles(self, model: LongcatModel | LongcatMTPModel, positions: Tensor) -> Angles:
        from longcat_core.layers import rotary

        return rotary.cos_sin(positions.unsqueeze(-1), model.inverse_frequencies, model.attention_factor)

    def project(
        self,
        attention: LongcatAttention,
        positions: Tensor,
        hidden_states: Tensor,
        forward_batch: ForwardBatch,
        zero_allocator: BumpAllocator,
        angles: Angles | None,
    ) -> Callable[[], Tensor]:
        from longcat_sglang.devices.cpu.attention import attend

        assert angles is not None
        return partial(attend, attention, hidden_states, forward_batch, *angles)

    def dense_ffn(self, ffn: LongcatFFN, hidden_states: Tensor) -> Tensor | None:
        from longcat_sglang.devices.cpu.linear import compiled_ffn

        compiled = compiled_ffn(ffn)
        return None if compiled is None else compiled(hidden_states)

    def decode(
        self,
        model: LongcatModel,
        embedded: Tensor,
        forward_batch: ForwardBatch,
        angles: Angles | None,
        choices: list[Tensor] | None,
    ) -> Tensor | None:
        from longcat_sglang.devices.cpu.decoding import decode

        assert angles is not None
        return decode(model, embedded, forward_batch, *angles, choices)

    def draft(
        self, model: LongcatMTPModel, embedded: Tensor, forward_batch: ForwardBatch, angles: Angles | None
    ) -> Tensor | None:
        from longcat_sglang.devices.cpu.drafting import draft

        assert angles is not None
        return draft(model, embedded, forward_batch, *angles)

    def fp8_kernels(self, activations: dtype) -> Fp8Kernels | None:
        from longcat_core.kernels.cpu.fp8 import CompiledFp8Kernels
        from longcat_core.kernels.cpu.product import takes_fp8

        return CompiledFp8Kernels() if takes_fp8(activations) else None

    def choose_kernels(self, model: nn.Module) -> None:
        from sglang.srt.layers.layernorm import RMSNorm

        from longcat_core.plugin.methods import compile_norms, replace_methods
        from longcat_sglang.devices.cpu.linear import METHODS

        replace_methods(model, METHODS)
        compile_norms(model, RMSNorm)

    def router_functions(self) -> RouterFunctions:
        return RouterFunctions(route)

    def expert_arguments(self, quant_config: LongcatFp8Config | None) -> dict[str, Any]:
        from longcat_sglang.devices.cpu.experts import CompactedRowsMethod
        from longcat_sglang.devices.cpu.fp8 import CompactedFp8RowsMethod

        return {"quant_method": CompactedRowsMethod() if quant_config is None else CompactedFp8RowsMethod(quant_config)}

    def branch(self) -> InARow:
        return InARow()

    def restore_experts(self, experts: Any) -> None:
        """SGLang does so itself before some updates, and not before one from a disk."""
        experts.quant_method.restore_weights_before_loading(experts)

    def reasons_for_own_class(self) -> list[str]:
        return []

    def unsupported(self, server_args: Any, settings: Any) -> list[str]:
        problems, algorithm = [], algorithm_of(settings)
        if algorithm not in (None, *MTP_ALGORITHMS):
            problems.append(
                f"speculative_algorithm: {algorithm!r}, wanted NEXTN, which drafts with LongCat's own MTP layer; NGRAM "
                "on a CPU needs sgl_kernel; change --speculative-algorithm"
            )
        wanted = (None, "auto", CPU_ATTENTION)
        for option in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
            given = getattr(server_args, option)
            if given not in wanted:
                flag = option.replace("_", "-")
                problems.append(f"{option}: {given!r}, wanted none on a CPU, as it has one backend; leave --{flag} out")
        if settings.kv_cache_dtype.startswith("fp"):
            problems.append(unsupported_cpu_cache(settings.kv_cache_dtype))
        if server_args.page_size not in (None, 1):
            problems.append(
                f"page_size: {server_args.page_size}, wanted 1 on a CPU, as SGLang's pages need Triton; "
                "leave --page-size out"
            )
        if settings.moe_a2a_backend != "none":
            problems.append(
                f"moe_a2a_backend: {settings.moe_a2a_backend!r}, wanted none on a CPU, as others move tokens between "
                "GPUs; leave --moe-a2a-backend out"
            )
        if settings.enable_torch_compile:
            problems.append("torch.compile on a CPU is not supported yet; leave --enable-torch-compile out")
        backend = settings.speculative_draft_attention_backend
        if drafts_with_mtp(settings) and backend not in (None, CPU_ATTENTION):
            problems.append(
                f"speculative_draft_attention_backend: {backend!r}, wanted none on a CPU, as it has one backend; "
                "leave --speculative-draft-attention-backend out"
            )
        return problems

    def cautions(self, server_args: Any, settings: Any, model_config: Any) -> list[str]:
        return []

    def obstacles_to_gate(self) -> list[str]:
        return []

    def obstacles_to_kernels(self, settings: Any, config: LongcatConfig, activations: dtype) -> list[str]:
        return ["they are for NVIDIA GPUs, and this is a CPU"]

    def obstacles_to_overlap(self, settings: Any) -> list[str]:
        return ["a CPU has no streams"]

    def what_overlaps(self, settings: Any) -> str:
        return "nothing"

    def implementations(self) -> list[Finding]:
        import torch

        from longcat_core.kernels.cpu.library import is_available, multiplies_bf16, products
        from longcat_core.kernels.cpu.product import FEW_ROWS
        from longcat_sglang.devices.cpu.attention import LatentAttentionBackend
        from longcat_sglang.devices.cpu.experts import select_cpu_kernel

        backend = f"{LatentAttentionBackend.__module__}.{LatentAttentionBackend.__qualname__}"
        kernels = [
            f"{select_cpu_kernel(dtype)} in {str(dtype).removeprefix('torch.')}"
            for dtype in (torch.bfloat16, torch.float32)
        ]
        has_fp8 = self.fp8_kernels(torch.bfloat16) is not None
        few_rows = f"ours for up to {FEW_ROWS} rows, else " if is_available() and multiplies_bf16() else ""
        return [
            Finding("attention", f"{backend}: any sizes, chunked prefill, radix cache"),
            Finding("MoE", f"rows of FFN experts only; {', '.join(kernels)}"),
            Finding("FP8", "in FP8 with activations in bfloat16" if has_fp8 else "dequantised when it is loaded"),
            Finding("products", few_rows + products()),
            Finding("cores", _cores(torch.get_num_threads(), len(os.sched_getaffinity(0)))),
        ]


def _cores(threads: int, cores: int) -> str:
    """What the model of a stock server with one rank computes on: SGLang leaves it to torch."""
    if threads >= cores:
        return f"all {cores} compute"
    return f"{threads} of {cores} compute, as OMP_NUM_THREADS or torch says; OMP_NUM_THREADS={cores} has all compute"
