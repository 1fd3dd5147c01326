"""A CPU: our MLA over vLLM's paged cache, and vLLM's MoE kernels over rows of FFN experts only."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from longcat_core.config import LongcatConfig
from longcat_core.kernels.cpu.routing import route
from longcat_core.layers.routing import RouterFunctions
from longcat_core.plugin.diagnosis import Finding
from longcat_core.plugin.engine import unsupported_cpu_cache
from longcat_core.weights.precision import Fp8Kernels
from longcat_vllm import requested
from longcat_vllm.devices.base import MOE_BACKENDS, Device
from longcat_vllm.devices.branch import Branch, InARow
from longcat_vllm.engine import mtp_speculation, shares_experts_over_a_transport

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from vllm.config import ParallelConfig, VllmConfig
    from vllm.config.parallel import EPLBConfig
    from vllm.distributed.eplb.eplb_state import EplbLayerState
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.v1.attention.backend import AttentionBackend

    from longcat_vllm.model import LongcatModel

WORKER = "longcat_vllm.devices.cpu.balancing.BalancingWorker"
STOCK_WORKERS = ("auto", "vllm.v1.worker.cpu_worker.CPUWorker")
EPLB = ("num_redundant_experts", "window_size", "step_interval", "log_balancedness", "log_balancedness_interval")
"""Of --eplb-config, what can be chosen on a CPU."""


class Cpu(Device):
    overlaps_unasked = True
    what_overlaps = "tokens are sent to experts and back while the dense path of their layer runs"

    def attention_backend(self) -> type[AttentionBackend]:
        from longcat_vllm.devices.cpu.attention import LatentAttentionBackend

        return LatentAttentionBackend

    def rotate(self, queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        from longcat_core.kernels.cpu.rotary import rotate

        return rotate(queries, keys, cos, sin)

    def decode(
        self, model: LongcatModel, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
    ) -> tuple[Tensor, list[Tensor] | None] | None:
        from longcat_vllm.devices.cpu.decoding import decode

        return decode(model, input_ids, positions, inputs_embeds)

    def fp8_kernels(self, dtype: torch.dtype) -> Fp8Kernels:
        from longcat_vllm.devices.cpu.fp8 import CpuFp8Kernels

        return CpuFp8Kernels(dtype)

    def fp8_linear_method(self, choose: Callable[[], QuantizeMethodBase | None]) -> QuantizeMethodBase:
        from longcat_vllm.devices.cpu.fp8 import CpuFp8LinearMethod

        return CpuFp8LinearMethod()

    def choose_kernels(self, model: nn.Module, is_drafter: bool = False) -> None:
        from vllm.model_executor.layers.layernorm import RMSNorm

        from longcat_core.plugin.methods import compile_norms, replace_methods
        from longcat_vllm.devices.cpu.linear import DRAFTER_METHODS, METHODS

        replace_methods(model, DRAFTER_METHODS if is_drafter else METHODS)
        compile_norms(model, RMSNorm)

    def router_functions(self) -> RouterFunctions:
        return RouterFunctions(route)

    def experts_method(
        self, choose: Callable[[], FusedMoEMethodBase], moe_config: FusedMoEConfig, is_fp8: bool
    ) -> FusedMoEMethodBase:
        from longcat_vllm.devices.cpu.experts import CompactedRowsMethod
        from longcat_vllm.devices.cpu.fp8 import CompactedFp8RowsMethod

        return CompactedFp8RowsMethod(moe_config) if is_fp8 else CompactedRowsMethod(moe_config)

    def branch(self, experts: MoERunner, parallel_config: ParallelConfig) -> Branch | None:
        if not shares_experts_over_a_transport(parallel_config):
            return None
        from longcat_vllm.devices.cpu.exchange import Exchanged

        exchanged = Exchanged(experts)
        return InARow(exchanged) if requested.current().overlap is False else exchanged

    def balanced(self, ids: Tensor, state: EplbLayerState) -> Tensor:
        from longcat_vllm.devices.cpu.balancing import place_and_count

        return place_and_count(ids, state)

    def expert_map(self, num_experts: int, device: torch.device | str) -> None:
        return None

    def has_packed(self, experts: RoutedExperts) -> bool:
        return hasattr(experts, "cpu_kernel")

    def reasons_for_own_class(self, vllm_config: VllmConfig) -> list[str]:
        return []  # vLLM's own does not run on a CPU

    def unsupported(self, vllm_config: VllmConfig) -> list[str]:
        from vllm.utils.torch_utils import is_quantized_kv_cache

        problems, parallel = [], vllm_config.parallel_config
        backend = vllm_config.kernel_config.moe_backend
        if backend not in MOE_BACKENDS:
            problems.append(
                f"moe_backend: {backend!r}, wanted one of {', '.join(MOE_BACKENDS)}; leave --moe-backend out"
            )
        if vllm_config.model_config.convert_type == "classify":
            problems.append("convert: 'classify', wanted none or embed on a CPU; leave --convert out")
        cache_dtype = vllm_config.cache_config.cache_dtype
        if is_quantized_kv_cache(cache_dtype):
            problems.append(unsupported_cpu_cache(cache_dtype))
        if parallel.data_parallel_size > 1 and not parallel.enable_expert_parallel:
            problems.append(
                f"data_parallel_size: {parallel.data_parallel_size} without expert parallelism, on a CPU, where ranks "
                "cannot gather each other's tokens; spread the experts too, or leave --data-parallel-size out"
            )
        if parallel.decode_context_parallel_size > 1:
            problems.append(
                f"decode_context_parallel_size: {parallel.decode_context_parallel_size}, wanted 1 on a CPU, where "
                "every rank attends to the whole context; leave --decode-context-parallel-size out"
            )
        return problems

    def obstacles_to_kernels(self, vllm_config: VllmConfig) -> list[str]:
        return ["they are for NVIDIA GPUs, and this is a CPU"]

    def obstacles_to_flashinfer_mla(self, vllm_config: VllmConfig) -> list[str]:
        return ["it is for NVIDIA GPUs, and this is a CPU"]

    def obstacles_to_overlap(self, vllm_config: VllmConfig) -> list[str]:
        if shares_experts_over_a_transport(vllm_config.parallel_config):
            return []
        return ["no tokens are sent to experts, as they are where data-parallel ranks share them"]

    def prepare_overlap(self, vllm_config: VllmConfig) -> None:
        """Nothing has to be."""

    def obstacles_to_eplb(self, vllm_config: VllmConfig, given: Mapping[str, Any]) -> list[str]:
        parallel, obstacles = vllm_config.parallel_config, []
        if unknown := sorted(given.keys() - set(EPLB)):
            obstacles.append(f"{', '.join(unknown)} in it, wanted {' or '.join(EPLB)}; correct it")
        else:
            try:
                _eplb_config(given)
            except ValueError as error:
                obstacles.append(f"{error}; correct it")
        if parallel.worker_cls not in (*STOCK_WORKERS, WORKER):
            obstacles.append(f"worker_cls is {parallel.worker_cls!r}, wanted vLLM's own; leave --worker-cls out")
        if mtp_speculation(vllm_config) is not None:
            # `_create_draft_vllm_config` makes a configuration anew, which is checked again (vLLM 0.32).
            obstacles.append("vLLM refuses it on a CPU as it makes a configuration of drafts; leave them out")
        if vllm_config.use_v2_model_runner:
            obstacles.append("this model runner is not known to move experts on a CPU; unset VLLM_USE_V2_MODEL_RUNNER")
        return obstacles

    def prepare_eplb(self, vllm_config: VllmConfig, given: Mapping[str, Any]) -> None:
        """vLLM refuses its own option on a CPU when it makes the configuration, before it knows the model."""
        parallel = vllm_config.parallel_config
        parallel.enable_eplb, parallel.eplb_config = True, _eplb_config(given)
        parallel.worker_cls = WORKER

    def implementations(self, config: LongcatConfig | None) -> list[Finding]:
        import torch

        from longcat_core.kernels.cpu.library import has_tiles, is_available, multiplies_bf16, products
        from longcat_core.kernels.cpu.product import FEW_ROWS
        from longcat_vllm.devices.cpu.experts import select_cpu_kernel

        backend = self.attention_backend()
        has_kernels = self.fp8_kernels(torch.bfloat16).take_experts(2048, 6144)
        hidden, inner = (config.hidden_size, config.expert_ffn_hidden_size) if config is not None else (6144, 2048)
        kernels = [
            f"{select_cpu_kernel(hidden, inner, dtype)} in {str(dtype).removeprefix('torch.')}"
            for dtype in (torch.bfloat16, torch.float32)
        ]
        name = f"{backend.__module__}.{backend.__qualname__}"
        is_ours = is_available() and multiplies_bf16() and not has_tiles()
        few_rows = f"ours for up to {FEW_ROWS} rows, else " if is_ours else ""
        return [
            Finding("attention", f"{name}: any sizes, chunked prefill, prefix caching"),
            Finding("MoE", f"rows of FFN experts only; {', '.join(kernels)}"),
            Finding("FP8", "in FP8 with activations in bfloat16" if has_kernels else "dequantised when it is loaded"),
            Finding("products", few_rows + products()),
            Finding("cores", _cores()),
        ]


def _eplb_config(given: Mapping[str, Any]) -> EPLBConfig:
    """Without a thread and a stream of its own, and with what sends tensors of a CPU as they are.

    Raises:
        ValueError: as vLLM does.
    """
    from vllm.config.parallel import EPLBConfig

    return EPLBConfig(**given, use_async=False, communicator="torch_nccl")


def _cores() -> str:
    """What vLLM itself says that the model of a stock server with one rank computes on."""
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    parallel = SimpleNamespace(local_world_size=1, data_parallel_rank_local=None, _api_process_count=1)
    config: Any = SimpleNamespace(parallel_config=parallel, kv_transfer_config=None)
    binding = OMPProcessManager(config)
    if binding.skip_setup:
        return "not bound: VLLM_CPU_OMP_THREADS_BIND is 'nobind'"
    computing, kept = len(binding.cpu_lists[0]), len(binding.reserved_cpu_list)
    if not kept:
        return f"all {computing} compute"
    return (
        f"{computing} of {computing + kept} compute, the rest is kept for vLLM's other processes; "
        "VLLM_CPU_NUM_OF_RESERVED_CPU=0 has all compute"
    )
