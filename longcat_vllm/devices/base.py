"""The interface of a device: all in which devices differ, for the model, its experts and its deployment."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from longcat_core.config import LongcatConfig
from longcat_core.layers.routing import RouterFunctions
from longcat_core.plugin.diagnosis import Finding
from longcat_core.weights.precision import Fp8Kernels

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

MOE_BACKENDS = ("auto", "triton", "flashinfer_cutlass", "humming")
"""Values of --moe-backend with which unquantised experts get a kernel of `cuda.experts.SKIP_ZERO_EXPERTS`."""

FP8_MOE_BACKENDS = ("auto", "triton", "flashinfer_cutlass", "deep_gemm")
"""The same for experts in FP8."""


class Device(ABC):
    """Without state, so that each can be made and called on any machine."""

    overlaps_unasked: ClassVar[bool]
    """Whether the experts run beside the dense path where they can and nobody has said anything."""
    what_overlaps: ClassVar[str]
    """What runs beside what then, as the log says it."""

    @abstractmethod
    def attention_backend(self) -> type[AttentionBackend] | None:
        """Our MLA backend, or None where vLLM chooses one of its own."""

    @abstractmethod
    def rotate(self, queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """`layers.rotary.rotate`, or what equals it and may do so in place."""

    @abstractmethod
    def decode(
        self, model: LongcatModel, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
    ) -> tuple[Tensor, list[Tensor] | None] | None:
        """What the model returns, in a decode step: hidden states with the last norm, [T, H], and the ids of the
        routings, of each layer [T, K]. None where the model is to be called."""

    @abstractmethod
    def fp8_kernels(self, dtype: torch.dtype) -> Fp8Kernels:
        """What is in FP8 here, with activations of this dtype; every other FP8 weight is dequantised when loaded."""

    @abstractmethod
    def fp8_linear_method(self, choose: Callable[[], QuantizeMethodBase | None]) -> QuantizeMethodBase | None:
        """The kernel of a linear layer that is in FP8. `choose` makes vLLM's own choice."""

    @abstractmethod
    def choose_kernels(self, model: nn.Module, is_drafter: bool = False) -> None:
        """Give the linear layers, the head and the norms of a model their kernels, where the engine's own are slow."""

    @abstractmethod
    def router_functions(self) -> RouterFunctions:
        """What computes the router of a model that is built now."""

    @abstractmethod
    def experts_method(
        self, choose: Callable[[], FusedMoEMethodBase], moe_config: FusedMoEConfig, is_fp8: bool
    ) -> FusedMoEMethodBase:
        """The kernel of FFN experts, which computes nothing for an id of -1. `choose` makes vLLM's own choice.

        Raises:
            ValueError: if there is no such kernel for this deployment.
        """

    @abstractmethod
    def branch(self, experts: MoERunner, parallel_config: ParallelConfig) -> Branch | None:
        """What dispatches, computes and combines the experts of a layer that is built now, or None where vLLM's runner
        does."""

    @abstractmethod
    def balanced(self, ids: Tensor, state: EplbLayerState) -> Tensor:
        """Where vLLM moves experts while it serves: ids, int32 [T, K], as the branch is to get them. Either it is given
        places, and rows of experts are counted here, or that is left to vLLM's router."""

    @abstractmethod
    def expert_map(self, num_experts: int, device: torch.device | str) -> Tensor | None:
        """For a rank that has all FFN experts: the expert map that the kernel needs, int32 [num_experts], or None if
        it needs none."""

    @abstractmethod
    def has_packed(self, experts: RoutedExperts) -> bool:
        """Whether a kernel has rearranged the weights of a layer's experts, so that they cannot be saved."""

    @abstractmethod
    def reasons_for_own_class(self, vllm_config: VllmConfig) -> list[str]:
        """What our class cannot serve yet on this device, and vLLM's own can."""

    @abstractmethod
    def unsupported(self, vllm_config: VllmConfig) -> list[str]:
        """Options that vLLM would accept on this device and then get wrong, each with what to do."""

    @abstractmethod
    def obstacles_to_kernels(self, vllm_config: VllmConfig) -> list[str]:
        """Why core's kernels cannot be used here, with these options."""

    @abstractmethod
    def obstacles_to_flashinfer_mla(self, vllm_config: VllmConfig) -> list[str]:
        """Why FlashInfer's MLA cannot be used here, with these options."""

    @abstractmethod
    def obstacles_to_overlap(self, vllm_config: VllmConfig) -> list[str]:
        """Why the experts cannot run beside the dense path here, with these options."""

    @abstractmethod
    def prepare_overlap(self, vllm_config: VllmConfig) -> None:
        """Set what has to be set for it before any worker starts. Only where it will be so."""

    @abstractmethod
    def obstacles_to_eplb(self, vllm_config: VllmConfig, given: Mapping[str, Any]) -> list[str]:
        """Why our option does not let experts move here, with these options."""

    @abstractmethod
    def prepare_eplb(self, vllm_config: VllmConfig, given: Mapping[str, Any]) -> None:
        """Set what has to be set for it before any worker starts."""

    @abstractmethod
    def implementations(self, config: LongcatConfig | None) -> list[Finding]:
        """Which attention and experts a model gets here, for `longcat doctor`; without `config`, with Chat's sizes."""
