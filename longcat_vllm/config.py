"""The configuration object that vLLM passes around: transformers', read by `longcat_core.config`."""

from __future__ import annotations

from typing import Any

import transformers

from longcat_core.config import canonical_hf
from longcat_vllm.compat import require_supported
from longcat_vllm.engine import ARCHITECTURE


class LongcatFlashConfig(transformers.LongcatFlashConfig):
    """Reads every published spelling, and refuses what is no LongCat-Flash or what this vLLM cannot serve."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        architectures = config_dict.get("architectures") or [ARCHITECTURE]
        if architectures[0] == ARCHITECTURE:  # Flash-Lite has the same model_type
            require_supported()
            config_dict = canonical_hf(config_dict)
        return super().from_dict(config_dict, **kwargs)
