"""FP8 in vLLM: its own methods for the layers that core has in FP8, and for all others none."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.fp8 import Fp8Config

from longcat_core.config import LongcatConfig
from longcat_core.quantization import PUBLISHED_BLOCK
from longcat_core.weights.precision import Precision
from longcat_vllm import devices


class LongcatFp8Config(Fp8Config):
    """vLLM's FP8 with core's choice of layers.

    vLLM compares `ignored_layers` with its own names of modules, so that a published name in it reaches neither half
    of a fused layer of LongCat-Flash, nor anything in the MTP layer.
    """

    def __init__(self, precision: Precision) -> None:
        super().__init__(
            is_checkpoint_fp8_serialized=True, activation_scheme="dynamic", weight_block_size=[*PUBLISHED_BLOCK]
        )
        self._precision = precision

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        choose = partial(super().get_quant_method, layer, prefix)
        if not isinstance(layer, LinearBase):
            return choose()
        if not self._precision.keeps(prefix, ranks=get_tensor_model_parallel_world_size()):
            return UnquantizedLinearMethod()
        return devices.current().fp8_linear_method(choose)

    def keeps_experts(self, prefix: str, moe_config: FusedMoEConfig) -> bool:
        return self._precision.keeps_experts(prefix, ranks=moe_config.moe_parallel_config.tp_size)


def of_model(
    vllm_config: VllmConfig,
    config: LongcatConfig,
    packed: Mapping[str, Sequence[str]],
    drafter: tuple[str, Collection[str]] | None = None,
) -> LongcatFp8Config | None:
    """For a model that is built now; packed and drafter: as `Precision`. None if no layer of it is in FP8."""
    if vllm_config.quant_config is None:
        return None
    kernels = devices.current().fp8_kernels(torch.get_default_dtype())
    return LongcatFp8Config(Precision(config, packed, kernels, drafter))
