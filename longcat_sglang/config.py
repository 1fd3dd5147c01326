"""The configuration object that SGLang passes around: its own, read by `longcat_core.config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang.srt import configs

from longcat_core.config import LongcatConfig, field_of
from longcat_core.family import Member, member_of
from longcat_core.overrides import overridden
from longcat_core.rope import rope_to_hf
from longcat_sglang.compat import require_supported


class LongcatFlashConfig(configs.LongcatFlashConfig):
    """Reads every published spelling, and refuses what is no LongCat-Flash or what this SGLang cannot serve."""

    def __init__(self, **fields: Any) -> None:  # transformers replaces an inherited one by a dataclass's
        super().__init__(**fields)

    @property
    def longcat(self) -> LongcatConfig:
        """The model as published. SGLang pads sizes of its own fields to whatever its CPU kernels divide by
        (configs/update_config.py), so the model is built from this."""
        return self._longcat

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if member_of(config_dict) is not Member.FLASH:  # the others are SGLang's own, under the same model_type
            return configs.LongcatFlashConfig.from_dict(config_dict, **kwargs)
        require_supported()
        longcat = LongcatConfig.from_hf(config_dict)
        result = super().from_dict(_sglang_spelling(config_dict, longcat), **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config._longcat = longcat
        # Set afterwards, as transformers would rewrite it: some of SGLang's MLA backends take their scale from it.
        config.rope_scaling = longcat.to_hf().get("rope_scaling")
        return result

    def overridden(self, overrides: Mapping[str, Any]) -> Any:
        """This model with fields of its `config.json`, in any published spelling, replaced by others.

        Raises:
            ConfigError: if that is no LongCat-Flash that can be served.
        """
        canonical = {**self.to_dict(), **self.longcat.to_hf(), "rope_parameters": _rope_parameters(self.longcat)}
        canonical.pop("rope_scaling", None)  # said by `rope_parameters`
        once = {name: value for name, value in canonical.items() if field_of(name) == name}
        return type(self).from_dict({**once, **overridden(once, overrides)})

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        fields.pop("_longcat", None)
        return fields


def _rope_parameters(longcat: LongcatConfig) -> dict[str, Any]:
    return {"rope_theta": longcat.rope.theta, **rope_to_hf(longcat.rope)}


def _sglang_spelling(raw: dict[str, Any], longcat: LongcatConfig) -> dict[str, Any]:
    """In SGLang's class `num_hidden_layers` is the number of decoder layers, which transformers saves doubled."""
    dropped = {"num_hidden_layers", "intermediate_size", "moe_intermediate_size", "rope_parameters", "head_dim"}
    kept = {key: value for key, value in raw.items() if key not in dropped}
    renamed = {"rope_scaling": None, "model_type": "longcat_flash", "num_experts_per_tok": longcat.moe_topk}
    return {**kept, **longcat.to_hf(), **renamed}
