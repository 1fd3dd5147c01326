"""The interface of a device: all in which devices differ, for the model, its experts and its deployment."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from longcat_core.config import LongcatConfig
from longcat_core.layers.routing import RouterFunctions
from longcat_core.plugin.diagnosis import Finding
from longcat_core.weights.precision import Fp8Kernels

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.utils import BumpAllocator
    from torch import Tensor, dtype, nn

    from longcat_sglang.attention import LongcatAttention
    from longcat_sglang.devices.branch import Branch
    from longcat_sglang.devices.cuda.rotary import LongcatRotaryEmbedding
    from longcat_sglang.ffn import LongcatFFN
    from longcat_sglang.model import LongcatModel
    from longcat_sglang.mtp import LongcatMTPModel
    from longcat_sglang.quantization import LongcatFp8Config

    Angles = tuple[Tensor, Tensor]
    """Cosines and sines, each fp32 [T, 1, rope / 2]."""


class Device(ABC):
    """Without state, so that each can be made and called on any machine."""

    attention_backend: ClassVar[str | None]
    """The name of our attention backend in SGLang's table, or None where SGLang chooses one of its own."""
    runs_own_class: ClassVar[bool]
    """Whether SGLang's own class of LongCat-Flash runs here."""

    @abstractmethod
    def prepare_process(self) -> None:
        """Called in each rank, before its model is built."""

    @abstractmethod
    def rotary_embedding(self, config: LongcatConfig) -> LongcatRotaryEmbedding | None:
        """What SGLang's attention rotates with, one for all attentions of a model; None where `project` rotates."""

    @abstractmethod
    def angles(self, model: LongcatModel | LongcatMTPModel, positions: Tensor) -> Angles | None:
        """What `project`, `decode` and `draft` rotate by; None where SGLang's attention does. positions: int64 [T]."""

    @abstractmethod
    def project(
        self,
        attention: LongcatAttention,
        positions: Tensor,
        hidden_states: Tensor,
        forward_batch: ForwardBatch,
        zero_allocator: BumpAllocator,
        angles: Angles | None,
    ) -> Callable[[], Tensor]:
        """An attention up to where tokens attend to each other, as far as the device parts them there.

        hidden_states: [T, H]; angles: as `angles` returns them. Returns what computes the rest, and the output, [T, H],
        a part of the sum over ranks."""

    @abstractmethod
    def dense_ffn(self, ffn: LongcatFFN, hidden_states: Tensor) -> Tensor | None:
        """[T, H] -> [T, H], a part of the sum over ranks; None where its two linear layers are to be asked."""

    @abstractmethod
    def decode(
        self,
        model: LongcatModel,
        embedded: Tensor,
        forward_batch: ForwardBatch,
        angles: Angles | None,
        choices: list[Tensor] | None,
    ) -> Tensor | None:
        """embedded: [T, H]; angles: as `angles` returns them; choices: where the ids of each layer's routing are to
        be noted. Returns the model's output with the last norm, [T, H]; None where its layers are to be asked."""

    @abstractmethod
    def draft(
        self, model: LongcatMTPModel, embedded: Tensor, forward_batch: ForwardBatch, angles: Angles | None
    ) -> Tensor | None:
        """embedded: [T, H], of the next tokens; angles: as `angles` returns them. Returns the MTP layer's output with
        the last norm, [T, H]; None where its modules are to be asked."""

    @abstractmethod
    def fp8_kernels(self, activations: dtype) -> Fp8Kernels | None:
        """What is in FP8 here, with activations of this dtype; every other FP8 weight is dequantised when loaded. None
        where all of them are."""

    @abstractmethod
    def choose_kernels(self, model: nn.Module) -> None:
        """Give the linear layers, the head and the norms of a model their kernels, where the engine's own are slow."""

    @abstractmethod
    def router_functions(self) -> RouterFunctions:
        """What computes the router of a model that is built now."""

    @abstractmethod
    def expert_arguments(self, quant_config: LongcatFp8Config | None) -> dict[str, Any]:
        """Arguments of SGLang's FusedMoE besides the model's sizes. quant_config: of experts in FP8."""

    @abstractmethod
    def branch(self) -> Branch:
        """When the MoE of a layer that is built now runs."""

    @abstractmethod
    def restore_experts(self, experts: Any) -> None:
        """Bring a layer's expert weights back into the layout in which tensors are loaded."""

    @abstractmethod
    def reasons_for_own_class(self) -> list[str]:
        """Why SGLang's own class serves on this device, whatever it is asked for."""

    @abstractmethod
    def unsupported(self, server_args: Any, settings: Any) -> list[str]:
        """Options that SGLang would accept on this device and then get wrong, each with what to do.

        server_args: what the user gave; settings: what SGLang made of it so far."""

    @abstractmethod
    def cautions(self, server_args: Any, settings: Any, model_config: Any) -> list[str]:
        """What works here and is slow, each with what to give instead. server_args, settings: as of `unsupported`."""

    @abstractmethod
    def obstacles_to_gate(self) -> list[str]:
        """Why no draft gate can be used here."""

    @abstractmethod
    def obstacles_to_kernels(self, settings: Any, config: LongcatConfig, activations: dtype) -> list[str]:
        """Why core's kernels cannot be used here, with these options."""

    @abstractmethod
    def obstacles_to_overlap(self, settings: Any) -> list[str]:
        """Why a layer's MoE cannot run beside its dense path here, with these options."""

    @abstractmethod
    def what_overlaps(self, settings: Any) -> str:
        """What runs beside a layer's dense path here, as the log says it, if there is no obstacle."""

    @abstractmethod
    def implementations(self) -> list[Finding]:
        """Which attention and experts a model gets here, for `longcat doctor`."""
