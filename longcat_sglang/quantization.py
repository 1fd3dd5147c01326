"""FP8 in SGLang: its own methods for the layers that core has in FP8, and for all others none."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod, Fp8MoEMethod
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.runtime_context import get_parallel
from torch import nn

from longcat_core.config import LongcatConfig
from longcat_core.quantization import PUBLISHED_BLOCK
from longcat_core.weights.blocks import FP8
from longcat_core.weights.names import SCALE_SUFFIX
from longcat_core.weights.precision import Precision
from longcat_sglang import devices


class LongcatFp8Config(Fp8Config):
    """SGLang's FP8 with core's choice of layers.

    SGLang compares `ignored_layers` with its own names of modules, so that a published name in it reaches nothing in
    the MTP layer, and one that is meant for the target reaches the MTP layer instead.
    """

    def __init__(self, precision: Precision, scale_fmt: str | None) -> None:
        """scale_fmt: as published beside the blocks' size; by it SGLang rounds the scales of activations."""
        super().__init__(
            is_checkpoint_fp8_serialized=True,
            activation_scheme="dynamic",
            weight_block_size=[*PUBLISHED_BLOCK],
            scale_fmt=scale_fmt,
        )
        self._precision = precision

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RadixAttention):  # whose method reads scales of an FP8 cache, which LongCat has none of
            return None
        if isinstance(layer, LinearBase) and not self._precision.keeps(prefix, _ranks_of(prefix)):
            return UnquantizedLinearMethod()
        return super().get_quant_method(layer, prefix)

    def keeps_experts(self, prefix: str) -> bool:
        return self._precision.keeps_experts(prefix, ranks=get_parallel().moe_tp_size)


def _ranks_of(prefix: str) -> int:
    """Over which a linear layer is split; data-parallel attention splits attentions over fewer."""
    parallel = get_parallel()
    return parallel.attn_tp_size if ".self_attn." in prefix else parallel.tp_size


def of_model(
    quant_config: QuantizationConfig | None,
    config: LongcatConfig,
    packed: Mapping[str, Sequence[str]],
    drafter: tuple[str, Collection[str]] | None = None,
) -> LongcatFp8Config | None:
    """For a model that is built now; packed and drafter: as `Precision`. None if no layer of it is in FP8."""
    kernels = devices.current().fp8_kernels(torch.get_default_dtype())
    if quant_config is None or kernels is None:
        return None
    assert isinstance(quant_config, Fp8Config), "deployment.check refuses others"
    return LongcatFp8Config(Precision(config, packed, kernels, drafter), quant_config.scale_fmt)


def laid_out_anew(model: nn.Module) -> list[str]:
    """Names of the FP8 weights that SGLang does not hold as published any more, as for DeepGEMM on Blackwell, which
    takes scales that are powers of two, and for Marlin on GPUs without FP8: tensors cannot be loaded into them."""
    found = []
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        weights: tuple[str, ...] = ()
        if isinstance(method, Fp8LinearMethod):
            weights = ("weight",)
        elif isinstance(method, Fp8MoEMethod):
            weights = ("w13_weight", "w2_weight")
        found += [f"{name}.{weight}" for weight in weights if not _is_as_published(module, weight)]
    return found


def _is_as_published(module: nn.Module, name: str) -> bool:
    if getattr(module, name).dtype != FP8:
        return False
    scales = getattr(module, name + SCALE_SUFFIX)
    return scales.dtype == torch.float32 and not getattr(scales, "format_ue8m0", False)
