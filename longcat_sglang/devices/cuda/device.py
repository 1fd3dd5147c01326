"""A GPU: SGLang's own MLA with core's rotary table, and those of its MoE kernels that drop a zero expert."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from longcat_core.config import LongcatConfig
from longcat_core.layers.routing import RouterFunctions, route
from longcat_core.plugin.diagnosis import Finding
from longcat_core.plugin.kernels import obstacles_to_kernels
from longcat_core.quantization import PUBLISHED_BLOCK
from longcat_core.weights.precision import Fp8Kernels
from longcat_sglang import requested
from longcat_sglang.devices.base import Device
from longcat_sglang.devices.branch import Branch, InARow

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.utils import BumpAllocator
    from torch import Tensor, dtype, nn

    from longcat_sglang.attention import LongcatAttention
    from longcat_sglang.devices.base import Angles
    from longcat_sglang.devices.cuda.rotary import LongcatRotaryEmbedding
    from longcat_sglang.ffn import LongcatFFN
    from longcat_sglang.model import LongcatModel
    from longcat_sglang.mtp import LongcatMTPModel
    from longcat_sglang.quantization import LongcatFp8Config

BACKENDS_BESIDE_KERNELS = (None, "auto", "triton")
"""Values of --moe-runner-backend with which weights stay as they are loaded."""

CASTS_AN_FP8_CACHE, READS_AN_FP8_CACHE = ("fa3", "flashinfer"), ("flashmla", "triton")
"""SGLang's attention backends for MLA on Hopper: those whose decode calls `get_key_buffer(layer_id).to(q.dtype)`, a
copy of all slots of the cache if that is in FP8, and those whose kernels read FP8. Read in SGLang 0.5.21."""


class Cuda(Device):
    attention_backend = None
    runs_own_class = True

    def prepare_process(self) -> None:
        """A GPU needs no preparation."""

    def rotary_embedding(self, config: LongcatConfig) -> LongcatRotaryEmbedding:
        from longcat_sglang.devices.cuda.rotary import LongcatRotaryEmbedding

        return LongcatRotaryEmbedding(config)

    def angles(self, model: LongcatModel | LongcatMTPModel, positions: Tensor) -> None:
        return None

    def project(
        self,
        attention: LongcatAttention,
        positions: Tensor,
        hidden_states: Tensor,
        forward_batch: ForwardBatch,
        zero_allocator: BumpAllocator,
        angles: Angles | None,
    ) -> Callable[[], Tensor]:
        """SGLang's own two halves, which dispatch to its MLA backends and rotate by `rotary_embedding`."""
        prepared = attention.forward_prepare(positions, hidden_states, forward_batch, zero_allocator)
        return partial(attention.forward_core, prepared)

    def dense_ffn(self, ffn: LongcatFFN, hidden_states: Tensor) -> None:
        return None

    def decode(
        self,
        model: LongcatModel,
        embedded: Tensor,
        forward_batch: ForwardBatch,
        angles: Angles | None,
        choices: list[Tensor] | None,
    ) -> None:
        return None

    def draft(
        self, model: LongcatMTPModel, embedded: Tensor, forward_batch: ForwardBatch, angles: Angles | None
    ) -> None:
        return None

    def fp8_kernels(self, activations: dtype) -> Fp8Kernels:
        return SglangFp8Kernels()

    def choose_kernels(self, model: nn.Module) -> None:
        """They are the engine's."""

    def router_functions(self) -> RouterFunctions:
        if not requested.current().kernels:
            return RouterFunctions(route)
        from longcat_core.kernels import operators

        return operators.ROUTER

    def expert_arguments(self, quant_config: LongcatFp8Config | None) -> dict[str, Any]:
        if not requested.current().kernels:
            return {}
        from longcat_sglang.devices.cuda.kernels import experts_method

        return {"quant_method": experts_method(quant_config)}

    def branch(self) -> Branch:
        if not requested.current().overlap:
            return InARow()
        from sglang.srt.layers.moe.utils import get_moe_a2a_backend
        from sglang.srt.runtime_context import get_stream

        from longcat_sglang.devices.cuda.overlap import Exchange, SecondStream

        return SecondStream(get_stream("longcat_moe")) if get_moe_a2a_backend().is_none() else Exchange()

    def restore_experts(self, experts: Any) -> None:
        """SGLang does so itself."""

    def reasons_for_own_class(self) -> list[str]:
        return []

    def unsupported(self, server_args: Any, settings: Any) -> list[str]:
        return []

    def cautions(self, server_args: Any, settings: Any, model_config: Any) -> list[str]:
        if not settings.kv_cache_dtype.startswith("fp8"):
            return []
        if (backend := _decode_backend(server_args, settings, model_config)) not in CASTS_AN_FP8_CACHE:
            return []
        return [
            f"--kv-cache-dtype {settings.kv_cache_dtype} with the attention backend {backend}: in each step SGLang "
            "casts the whole cache, in use or not, to the model's dtype, an attention at a time; give "
            f"--decode-attention-backend {' or '.join(READS_AN_FP8_CACHE)}, or leave --kv-cache-dtype out"
        ]

    def obstacles_to_gate(self) -> list[str]:
        return ["CUDA graphs verify a fixed number of drafts"]

    def obstacles_to_kernels(self, settings: Any, config: LongcatConfig, activations: dtype) -> list[str]:
        ranks = settings.tp_size // settings.ep_size
        obstacles = obstacles_to_kernels(config, activations, capability(), ranks)
        for option in ("moe_runner_backend", "speculative_moe_runner_backend"):
            value = getattr(settings, option)
            if value not in BACKENDS_BESIDE_KERNELS:
                flag = option.replace("_", "-")
                obstacles.append(f"{option} is {value!r}, which is another kernel; leave --{flag} out")
        if settings.moe_a2a_backend != "none":
            obstacles.append(
                f"moe_a2a_backend is {settings.moe_a2a_backend!r}, wanted none; leave --moe-a2a-backend out"
            )
        if settings.enable_deterministic_inference:
            obstacles.append("tiles depend on the batch; leave --enable-deterministic-inference out")
        return obstacles

    def obstacles_to_overlap(self, settings: Any) -> list[str]:
        return []

    def what_overlaps(self, settings: Any) -> str:
        if settings.moe_a2a_backend == "none":
            return "its MoE, on a second stream, in CUDA graphs of whole steps; in other steps it comes first"
        return "tokens on their way to experts and back; in CUDA graphs in pieces the MoE comes first"

    def implementations(self) -> list[Finding]:
        from longcat_sglang.options import SKIP_ZERO_EXPERTS

        return [
            Finding("attention", "SGLang's MLA backend of its choice (--attention-backend)"),
            Finding("MoE", f"zero experts as id -1, skipped by one of {', '.join(SKIP_ZERO_EXPERTS)}"),
            Finding("FP8", "SGLang's own kernels, with activations in FP8"),
        ]


def _decode_backend(server_args: Any, settings: Any, model_config: Any) -> str:
    """What SGLang will take, which it settles after options were checked (`handle_attention_backend_compatibility`)."""
    from sglang.srt.arg_groups.model_override_base import get_default_attn_backend

    backend = settings.decode_attention_backend or settings.attention_backend
    if backend is None:
        backend = get_default_attn_backend(server_args, use_mla_backend=True, model_config=model_config)
    # Its FlashAttention 3 knows no e5m2, and Triton's kernels are taken instead.
    return "triton" if (backend, settings.kv_cache_dtype) == ("fa3", "fp8_e5m2") else str(backend)


def capability() -> tuple[int, int] | None:
    """Of NVIDIA's GPU; None if there is none."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() and torch.version.hip is None else None


class SglangFp8Kernels(Fp8Kernels):
    """SGLang's own, as in SGLang 0.5.21; those of linear layers fall back to Triton's for most sizes."""

    def take_linear(self, projections: Sequence[str], rows: Sequence[int], columns: int) -> bool:
        """All have one scale for 128 activations of a row (`per_token_group_quant_fp8`). FlashInfer's CUTLASS kernel,
        the only one without a fallback, has no scale for a last block of fewer rows."""
        from sglang.srt.layers.quantization.fp8_utils import get_fp8_gemm_runner_backend

        if columns % PUBLISHED_BLOCK[1]:
            return False
        return not (get_fp8_gemm_runner_backend().is_flashinfer_cutlass() and sum(rows) % PUBLISHED_BLOCK[0])

    def take_experts(self, inner: int, hidden: int) -> bool:
        """Rows of gate and up projection have their own scales, so the latter's begin with a block."""
        return inner % PUBLISHED_BLOCK[0] == 0 and hidden % PUBLISHED_BLOCK[1] == 0
