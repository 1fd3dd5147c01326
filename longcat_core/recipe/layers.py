"""The linear layers that FP8 is for, of what kind they are, and which of them are in FP8 together or not at all."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from longcat_core.config import LongcatConfig
from longcat_core.quantization import Quantization
from longcat_core.weights import plan
from longcat_core.weights.blocks import scale_shape
from longcat_core.weights.names import all_tensors, is_mtp

DRAFT_LAYER = "draft layer (MTP)"
_ENGINE = plan.Layout(fused_qkv_a="fused_qkv_a_proj", experts="experts")
"""Both engines fuse the same pairs; their names for them do not matter here."""


class Layer(NamedTuple):
    """One linear layer, y = W x."""

    name: str
    """As published, without `.weight`; so `ignored_layers` names it."""
    kind: str
    """Such as "attention o_proj", or `DRAFT_LAYER`, whose linear layers are one kind."""
    group: str
    """Layers of one group are in FP8 together or not at all: engines have the two projections of a pair in one
    parameter, all experts of a decoder layer in two, and read of the draft layer only whether it is in FP8."""
    shape: tuple[int, int]
    """[outputs, inputs]."""

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def fp8_bytes(self) -> int:
        """With its scales, in fp32."""
        rows, columns = scale_shape(self.shape, Quantization("fp8").block)
        return self.elements + 4 * rows * columns


def linear_layers(config: LongcatConfig, tensors: Iterable[str]) -> list[Layer]:
    """Those of the published `tensors` of a model that an FP8 release may have in FP8, in their order."""
    fp8, shapes = Quantization("fp8"), all_tensors(config)
    targets = plan.load_plan(config, _ENGINE)
    found = []
    for name in tensors:
        if not fp8.is_fp8(name):
            continue
        rows, columns = shapes[name]
        module = name.removesuffix(".weight")
        if is_mtp(name):
            kind, group = DRAFT_LAYER, "model.mtp"
        else:
            parent, projection = module.rsplit(".", 1)
            part = "attention" if ".self_attn." in name else "dense FFN" if ".mlps." in name else "experts"
            kind = f"{part} {projection}"
            is_expert = plan.expert_of(name) is not None
            group = parent.rsplit(".", 1)[0] if is_expert else targets[name].parameter.removesuffix(".weight")
        found.append(Layer(module, kind, group, (rows, columns)))
    return found
