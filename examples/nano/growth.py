"""Model growth: a model of twice the depth out of a trained one, by stacking its layers upon themselves."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.reference import LongcatForCausalLM

_LAYERS = "model.layers."


def source(name: str, layers: int) -> str:
    """The parameter of the model with `layers` layers that a parameter of the grown model is a copy of: the lower half
    of the layers is the small model's, and so is the upper half, in order (report, section 3: l1 .. ln l1 .. ln)."""
    if not name.startswith(_LAYERS):
        return name
    index, rest = name.removeprefix(_LAYERS).split(".", 1)
    return f"{_LAYERS}{int(index) % layers}.{rest}"


def grown(model: LongcatForCausalLM, config: LongcatConfig) -> LongcatForCausalLM:
    """A model of twice the depth, on the same device.

    Raises:
        ValueError: if `config` does not have twice as many layers.
    """
    layers = model.config.num_layers
    if config.num_layers != 2 * layers:
        raise ValueError(f"{config.num_layers} layers out of {layers}: wanted {2 * layers}, each one twice")
    larger = LongcatForCausalLM(config, with_mtp=model.model.mtp is not None).to(model.lm_head.weight.device)
    larger.load_state_dict(stacked(model.state_dict(), list(larger.state_dict()), layers))
    return larger


def stacked(state: Mapping[str, Tensor], names: list[str], layers: int) -> dict[str, Tensor]:
    """What is kept by parameter, be it weights or an optimizer's moments, for the grown model's `names`."""
    return {name: state[source(name, layers)].clone() for name in names}
