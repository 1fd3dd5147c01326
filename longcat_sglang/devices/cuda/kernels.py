"""FFN experts on a GPU by core's kernels, on request: a runner core of SGLang, with the weights as SGLang has them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang.srt.layers.moe.moe_runner.base import DispatchMoeRunnerCore, MoeQuantInfo, MoeRunnerConfig
from sglang.srt.layers.moe.moe_runner.runner import MoeRunner, register_moe_runner_core
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import RegisteredMoeRunnerBackend
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.utils import get_device_name

from longcat_core.kernels import operators
from longcat_core.kernels.experts import ExpertWeights

if TYPE_CHECKING:
    from longcat_sglang.quantization import LongcatFp8Config

BACKEND = RegisteredMoeRunnerBackend("longcat")


@dataclass
class LongcatWeights(MoeQuantInfo):
    experts: ExpertWeights


class LongcatRunnerCore(DispatchMoeRunnerCore):
    """Rows of local FFN experts only: SGLang's dispatcher has made -1 of every other choice.

    An operator, into which torch.compile does not look. Nothing is read back from the device, and all that depends on
    the routing is on it, as a CUDA graph needs.
    """

    def __init__(self, config: MoeRunnerConfig) -> None:
        super().__init__(config)
        self._device = get_device_name()

    @property
    def runner_backend(self) -> RegisteredMoeRunnerBackend:
        return BACKEND

    def run_from_dispatch(
        self,
        dispatch_output: Any,
        quant_info: MoeQuantInfo,
        runner_config: MoeRunnerConfig,
        hooks: Any = None,
    ) -> StandardCombineInput:
        assert isinstance(dispatch_output, StandardDispatchOutput)
        assert isinstance(dispatch_output.topk_output, StandardTopKOutput)
        assert isinstance(quant_info, LongcatWeights)
        weights, ids, _ = dispatch_output.topk_output
        given = (dispatch_output.hidden_states, ids, weights, quant_info.experts, self._device)
        num_experts = runner_config.num_experts  # zero experts among them, see `moe._skip_zero_experts`
        assert num_experts is not None
        return StandardCombineInput(operators.routed_experts(*given, spread_over=num_experts))


register_moe_runner_core(BACKEND.value, LongcatRunnerCore)


class LongcatExpertsMethod(UnquantizedFusedMoEMethod):
    """Another backend than Triton's, for which SGLang would interleave gate and up where it is told to."""

    def create_moe_runner(self, layer: Any, moe_runner_config: MoeRunnerConfig) -> None:
        self.moe_runner_config = moe_runner_config
        self.runner = MoeRunner(BACKEND, moe_runner_config)
        self._aiter_runner = None

    def apply(  # type: ignore[override]  # another method than a module's, as UnquantizedFusedMoEMethod's
        self, layer: Any, dispatch_output: Any
    ) -> Any:
        assert self.runner is not None
        experts = ExpertWeights(layer.w13_weight, layer.w2_weight)
        return self.runner.run(dispatch_output, LongcatWeights(experts))


class LongcatFp8ExpertsMethod(Fp8MoEMethod):
    def create_moe_runner(self, layer: Any, moe_runner_config: MoeRunnerConfig) -> None:
        self.moe_runner_config = moe_runner_config
        self.runner = MoeRunner(BACKEND, moe_runner_config)

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        assert self.runner is not None
        scales = layer.w13_weight_scale_inv, layer.w2_weight_scale_inv
        experts = ExpertWeights(layer.w13_weight, layer.w2_weight, *scales)
        return self.runner.run(dispatch_output, LongcatWeights(experts))


def experts_method(quant_config: LongcatFp8Config | None) -> FusedMoEMethodBase:
    """Of experts in FP8, or of those that are not quantised."""
    return LongcatExpertsMethod() if quant_config is None else LongcatFp8ExpertsMethod(quant_config)
