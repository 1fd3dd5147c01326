"""FFN experts on a GPU: those of vLLM's kernels that drop a zero expert, an id of -1, and the choice among them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable

from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

logger = init_logger(f"vllm.{__name__}")

SKIP_ZERO_EXPERTS = ("TritonExperts", "FlashInferExperts", "TritonOrDeepGemmExperts")
"""vLLM's experts that skip ids of -1: by the expert map, by the range of a rank's experts, and by the map again, which
DeepGEMM's counting and scattering of rows read as Triton's do (read in vLLM 0.32)."""


def kernel_of(method: FusedMoEMethodBase) -> str:
    """The name of vLLM's experts class; if there is none, as where a kernel does its own routing, of the method's."""
    experts = getattr(method, "experts_cls", None)
    return (experts or type(method)).__name__


def skipping_zero_experts(choose: Callable[[], FusedMoEMethodBase], moe_config: FusedMoEConfig) -> FusedMoEMethodBase:
    """vLLM's choice of a kernel if that is known to skip zero experts, else Triton's.

    `deployment.check` has refused every other kernel that a user can request.

    Raises:
        ValueError: if there is no such kernel for this deployment.
    """
    method = choose()
    chosen = kernel_of(method)
    if chosen in SKIP_ZERO_EXPERTS:
        return method
    moe_config.moe_backend = "triton"
    method = choose()
    if kernel_of(method) not in SKIP_ZERO_EXPERTS:
        raise ValueError(
            f"MoE kernel {kernel_of(method)} is not known to skip zero experts, wanted one of "
            f"{', '.join(SKIP_ZERO_EXPERTS)}; leave --all2all-backend out"
        )
    logger.info_once(
        "LongCat experts: %s instead of vLLM's choice, %s, which is not known to skip zero experts.",
        kernel_of(method),
        chosen,
    )
    return method
