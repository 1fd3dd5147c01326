"""The configuration object that vLLM passes around: transformers', read by `longcat_core.config`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import transformers

from longcat_core import spellings
from longcat_core.config import ConfigError
from longcat_core.family import ARCHITECTURE, ARCHITECTURES, Member, member_of
from longcat_core.spellings import overridden
from longcat_vllm.hooks import require_supported


class LongcatFlashConfig(transformers.LongcatFlashConfig):
    """Reads every published spelling; refuses other models, and what this vLLM cannot serve."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        member = member_of(config_dict)
        if member is Member.FLASH:
            require_supported()
            config_dict = {**spellings.for_transformers(config_dict), "architectures": [ARCHITECTURE]}
        elif set(config_dict.get("architectures") or ()) & set(ARCHITECTURES):
            # vLLM has Flash-Lite under a name of its own, and would take this one for LongCat-Flash.
            raise ConfigError(
                f"architectures: {config_dict['architectures']!r} with fields of {member.value}: wanted LongCat-Flash, "
                "as vLLM has no such model under this name; serve it with an engine that has"
            )
        return super().from_dict(config_dict, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """vLLM's `hf_overrides` come as attributes of a configuration that is read already."""
        for field, given in self._as_read({name: value}).items():
            super().__setattr__(field, given)

    def update(self, config_dict: dict[str, Any]) -> None:
        """Several at once, which may be spellings of one field."""
        for field, given in self._as_read(config_dict).items():
            super().__setattr__(field, given)

    def _as_read(self, overrides: dict[str, Any]) -> dict[str, Any]:
        is_read = ARCHITECTURE in (self.__dict__.get("architectures") or ()) and "rope_theta" in (
            self.__dict__.get("rope_parameters") or ()
        )
        return overridden(self.__dict__, overrides) if is_read else overrides
