"""A GPU: vLLM's own MLA backends, and those of its MoE kernels that drop a zero expert."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from longcat_core import spellings
from longcat_core.config import LongcatConfig
from longcat_core.layers import rotary
from longcat_core.layers.routing import RouterFunctions, route
from longcat_core.plugin.diagnosis import Finding
from longcat_core.plugin.engine import unserved_quantization
from longcat_core.plugin.kernels import obstacles_to_kernels
from longcat_core.quantization import PUBLISHED_BLOCK
from longcat_core.weights.precision import Fp8Kernels
from longcat_vllm import requested
from longcat_vllm.devices.base import FP8_MOE_BACKENDS, MOE_BACKENDS, Device
from longcat_vllm.engine import TRANSPORT_WITH_TOO_FEW_COLUMNS, shares_experts_over_a_transport

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from vllm.config import ParallelConfig, VllmConfig
    from vllm.distributed.eplb.eplb_state import EplbLayerState
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.v1.attention.backend import AttentionBackend

    from longcat_vllm.devices.branch import Branch
    from longcat_vllm.model import LongcatModel

TRANSPORTS = ("allgather_reducescatter", "deepep_high_throughput")
"""Values of --all2all-backend of which it is known what they do with an id of -1: they hand it on, or make it an expert
of another rank, which the expert map drops (prepare_finalize/naive_dp_ep.py and deepep_ht.py in vLLM 0.32)."""

WITHOUT_NCCL = "deepep_high_throughput"
"""The one of `TRANSPORTS` whose kernels are not NCCL's."""

WORKER = "longcat_vllm.devices.cuda.worker.OverlapWorker"
STOCK_WORKERS = ("auto", "vllm.v1.worker.gpu_worker.Worker")

HOPPER = 9
FLASHINFER_MLA_DIMS = (512, 64)
"""Latent and rope dimension for which FlashInfer's kernels for Hopper were compiled."""

TRANSPORT_OF_KERNELS = "allgather_reducescatter"
"""The value of --all2all-backend with which our kernels get choices as the router makes them: vLLM's default."""


class Cuda(Device):
    overlaps_unasked = False  # no GPU has run it
    what_overlaps = (
        "the experts of a layer run on a second stream, beside its dense path, in CUDA graphs of whole steps and in "
        "steps without a graph; in graphs in pieces they come first"
    )

    def attention_backend(self) -> type[AttentionBackend] | None:
        if not requested.current().flashinfer_mla:
            return None
        from longcat_vllm.devices.cuda.attention import FlashInferPagedMLABackend

        return FlashInferPagedMLABackend

    def rotate(self, queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotary.rotate(queries, keys, cos, sin)

    def decode(
        self, model: LongcatModel, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
    ) -> None:
        return None

    def fp8_kernels(self, dtype: torch.dtype) -> Fp8Kernels:
        return VllmFp8Kernels()

    def fp8_linear_method(self, choose: Callable[[], QuantizeMethodBase | None]) -> QuantizeMethodBase | None:
        return choose()

    def choose_kernels(self, model: nn.Module, is_drafter: bool = False) -> None:
        """They are the engine's."""

    def router_functions(self) -> RouterFunctions:
        if not requested.current().kernels:
            return RouterFunctions(route)
        from longcat_core.kernels import operators

        return operators.ROUTER

    def experts_method(
        self, choose: Callable[[], FusedMoEMethodBase], moe_config: FusedMoEConfig, is_fp8: bool
    ) -> FusedMoEMethodBase:
        moe_config.is_lora_enabled = False  # adapters.py: no adapter changes experts, so any kernel will do
        if requested.current().kernels:
            from longcat_vllm.devices.cuda.kernels import with_our_kernels

            return with_our_kernels(choose, moe_config)
        from longcat_vllm.devices.cuda.experts import skipping_zero_experts

        return skipping_zero_experts(choose, moe_config)

    def branch(self, experts: MoERunner, parallel_config: ParallelConfig) -> Branch | None:
        if not requested.current().overlap:
            return None
        from longcat_vllm.devices.cuda.overlap import SecondStream

        return SecondStream(experts)

    def balanced(self, ids: Tensor, state: EplbLayerState) -> Tensor:
        return ids  # vLLM's router has a kernel for both, which leaves an id of -1 as it is (router/base_router.py)

    def expert_map(self, num_experts: int, device: torch.device | str) -> Tensor | None:
        """The identity. With a map, vLLM's Triton experts drop an id of -1 (`moe_align_block_size`, `moe_sum`);
        without one, they sum its uninitialised output. Our kernels need none.
        """
        if requested.current().kernels:
            return None
        import torch

        return torch.arange(num_experts, dtype=torch.int32, device=device)

    def has_packed(self, experts: RoutedExperts) -> bool:
        from longcat_vllm.devices.cuda.experts import kernel_of

        method = experts.quant_method
        return kernel_of(method) == "FlashInferExperts" and method.moe_kernel is not None

    def reasons_for_own_class(self, vllm_config: VllmConfig) -> list[str]:
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        backend, transport = vllm_config.kernel_config.moe_backend, parallel.all2all_backend
        reasons = []
        reasons += unserved_quantization(model.quantization, model.hf_config, any_block=False)
        if model.convert_type == "classify":
            reasons.append("longcat-serving has no head of a classifier")
        backends = MOE_BACKENDS if model.quantization is None else FP8_MOE_BACKENDS
        if backend not in backends:
            reasons.append(f"moe_backend {backend!r} is not known to skip zero experts, {', '.join(backends)} are")
        known = (*TRANSPORTS, TRANSPORT_WITH_TOO_FEW_COLUMNS)  # which is refused, as its room is no larger for vLLM's
        if shares_experts_over_a_transport(parallel) and transport not in known:
            reasons.append(
                f"all2all_backend {transport!r} is not known to take zero experts, {', '.join(TRANSPORTS)} are"
            )
        return reasons

    def unsupported(self, vllm_config: VllmConfig) -> list[str]:
        return []

    def obstacles_to_kernels(self, vllm_config: VllmConfig) -> list[str]:
        from vllm import envs

        model: Any = vllm_config.model_config
        parallel = vllm_config.parallel_config
        all_ranks = parallel.tensor_parallel_size * parallel.data_parallel_size * parallel.prefill_context_parallel_size
        ranks = 1 if parallel.enable_expert_parallel else all_ranks
        obstacles = obstacles_to_kernels(spellings.read(model.hf_config), model.dtype, capability(), ranks)
        backend, transport = vllm_config.kernel_config.moe_backend, parallel.all2all_backend
        if backend not in ("auto", "triton"):
            obstacles.append(f"moe_backend is {backend!r}, which is another kernel; leave --moe-backend out")
        if shares_experts_over_a_transport(parallel) and transport != TRANSPORT_OF_KERNELS:
            wanted = f"wanted {TRANSPORT_OF_KERNELS!r}; leave --all2all-backend out"
            obstacles.append(f"all2all_backend is {transport!r}, {wanted}")
        if envs.VLLM_BATCH_INVARIANT:
            obstacles.append("VLLM_BATCH_INVARIANT is set, and tiles depend on the batch; unset it")
        return obstacles

    def obstacles_to_flashinfer_mla(self, vllm_config: VllmConfig) -> list[str]:
        from vllm import envs
        from vllm.utils.flashinfer import has_flashinfer

        model: Any = vllm_config.model_config
        config = spellings.read(model.hf_config)
        obstacles = []
        found = capability()
        if found is None or found[0] != HOPPER:
            name = "no GPU of NVIDIA's" if found is None else f"compute capability {found[0]}.{found[1]}"
            obstacles.append(
                f"{name}, wanted Hopper's, 9.0; on Blackwell vLLM's own choice is FlashInfer's MLA already"
            )
        if not has_flashinfer():
            obstacles.append("vLLM finds no FlashInfer; install flashinfer-python in the version that vLLM requires")
        if (config.kv_lora_rank, config.qk_rope_head_dim) != FLASHINFER_MLA_DIMS:
            found_dims = f"latent {config.kv_lora_rank} and rope {config.qk_rope_head_dim}"
            obstacles.append(f"{found_dims}, wanted {FLASHINFER_MLA_DIMS[0]} and {FLASHINFER_MLA_DIMS[1]}")
        if (backend := vllm_config.attention_config.backend) is not None:
            obstacles.append(f"attention_backend is {backend.name}; leave --attention-backend out")
        if (ranks := vllm_config.parallel_config.decode_context_parallel_size) > 1:
            obstacles.append(f"decode_context_parallel_size is {ranks}, wanted 1")
        if envs.VLLM_BATCH_INVARIANT:
            obstacles.append("VLLM_BATCH_INVARIANT is set, and the work is split by the batch; unset it")
        return obstacles

    def obstacles_to_overlap(self, vllm_config: VllmConfig) -> list[str]:
        parallel = vllm_config.parallel_config
        obstacles = []
        if parallel.use_ubatching:
            obstacles.append(
                "a batch is split in two, of which one half runs beside the other; leave --enable-dbo and "
                "--ubatch-size out"
            )
        if (ranks := parallel.prefill_context_parallel_size) > 1:
            obstacles.append(
                f"prefill_context_parallel_size is {ranks}, wanted 1, as experts and attention would gather from the "
                "same ranks in two streams at once"
            )
        if (
            parallel.data_parallel_size > 1
            and parallel.tensor_parallel_size > 1
            and not (shares_experts_over_a_transport(parallel) and parallel.all2all_backend == WITHOUT_NCCL)
        ):
            obstacles.append(
                "tokens are sent to experts by NCCL, which would sum over tensor-parallel ranks in another stream at "
                f"the same time; leave --tensor-parallel-size out, or give --all2all-backend {WITHOUT_NCCL} with "
                "--enable-expert-parallel"
            )
        if parallel.worker_cls not in (*STOCK_WORKERS, WORKER):
            obstacles.append(f"worker_cls is {parallel.worker_cls!r}, wanted vLLM's own; leave --worker-cls out")
        return obstacles

    def prepare_overlap(self, vllm_config: VllmConfig) -> None:
        vllm_config.parallel_config.worker_cls = WORKER

    def obstacles_to_eplb(self, vllm_config: VllmConfig, given: Mapping[str, Any]) -> list[str]:
        return ["it is for CPUs, for which vLLM has none; give --enable-eplb and --eplb-config"]

    def prepare_eplb(self, vllm_config: VllmConfig, given: Mapping[str, Any]) -> None:
        """It is vLLM's own."""

    def implementations(self, config: LongcatConfig | None) -> list[Finding]:
        import torch

        from longcat_vllm.devices.cuda.experts import SKIP_ZERO_EXPERTS

        attention, experts = engine_choice(config, torch.bfloat16)
        kernel = experts if experts in SKIP_ZERO_EXPERTS else f"TritonExperts instead of vLLM's choice, {experts},"
        if experts == "FlashInferExperts":
            kernel += ", which FlashInfer compiles while vLLM starts, unless `vllm download-kernels` was run,"
        return [
            Finding("attention", f"{attention} in bfloat16, unless --attention-backend says otherwise"),
            Finding(
                "MoE",
                f"{kernel} in bfloat16 on one rank, unless --moe-backend, or --all2all-backend of several, says "
                "otherwise; zero experts as id -1",
            ),
            Finding("FP8", "vLLM's own kernels, with activations in FP8"),
        ]


def capability() -> tuple[int, int] | None:
    """Of NVIDIA's GPU; None if there is none."""
    from vllm.platforms import current_platform

    found = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return None if found is None else (found.major, found.minor)


class VllmFp8Kernels(Fp8Kernels):
    """vLLM's own, which refuse by themselves what they do not compute."""

    def take_linear(self, projections: Sequence[str], rows: Sequence[int], columns: int) -> bool:
        """`get_and_maybe_dequant_weights`, by which MLA absorbs `kv_b_proj`, needs whole blocks (vLLM 0.32)."""
        return projections[0] != "kv_b_proj" or not (rows[0] % PUBLISHED_BLOCK[0] or columns % PUBLISHED_BLOCK[1])

    def take_experts(self, inner: int, hidden: int) -> bool:
        return True


def engine_choice(config: LongcatConfig | None, dtype: torch.dtype) -> tuple[str, str]:
    """vLLM's own attention backend and MoE kernel for one rank; without a configuration, LongCat-Flash-Chat's sizes."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import select_unquantized_moe_backend
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import get_attn_backend

    hidden, inner = (config.hidden_size, config.expert_ffn_hidden_size) if config is not None else (6144, 2048)
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
