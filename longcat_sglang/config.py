"""The configuration object that SGLang passes around: its own, read by `longcat_core.config`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt import configs

from longcat_core import spellings
from longcat_core.config import LongcatConfig
from longcat_core.family import Member, member_of
from longcat_core.quantization import quantization_fields
from longcat_sglang.engine import is_longcat
from longcat_sglang.hooks import require_supported


class LongcatFlashConfig(configs.LongcatFlashConfig):
    """Reads every published spelling; refuses other models, and what this SGLang cannot serve."""

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
        longcat = spellings.read(config_dict)
        result = super().from_dict(spellings.for_sglang(config_dict), **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config._longcat = longcat
        # Set afterwards, as transformers would rewrite it: some of SGLang's MLA backends take their scale from it.
        config.rope_scaling = spellings.published(longcat).get("rope_scaling")
        return result

    def overridden(self, overrides: Mapping[str, Any]) -> Any:
        """This model with fields of its `config.json`, in any published spelling, replaced by others.

        Raises:
            ConfigError: if the result is not a LongCat-Flash that can be served.
        """
        fields = self.to_dict()
        canonical = {
            **fields,
            **spellings.published(self.longcat),
            **quantization_fields(fields),
            "rope_parameters": spellings.rope_parameters(self.longcat.rope),
        }
        canonical.pop("rope_scaling", None)  # said by `rope_parameters`
        once = {name: value for name, value in canonical.items() if spellings.field_of(name) == name}
        return type(self).from_dict({**once, **spellings.overridden(once, overrides)})

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        fields.pop("_longcat", None)
        return fields


def read_again_as_overridden(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    config = original(*args, **kwargs)
    return config.overridden(kwargs["model_override_args"]) if is_longcat(config) else config
