"""Entries in vLLM's tables, and in transformers': how the rows of `hooks.HOOKS` make them and look them up."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from longcat_core.family import ARCHITECTURE, ARCHITECTURES
from longcat_vllm.engine import CHAT, DRAFT_ARCHITECTURE, OWN_ARCHITECTURE

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PARSER = "longcat"
"""The value of --tool-call-parser and --reasoning-parser."""


def register_model() -> None:
    _register(ARCHITECTURE, "longcat_vllm.model:LongcatFlashForCausalLM")


def registered_model() -> str:
    return _registered(ARCHITECTURE)


def register_own_model() -> None:
    _register(OWN_ARCHITECTURE, "vllm.model_executor.models.longcat_flash:LongcatFlashForCausalLM")


def registered_own_model() -> str:
    return __name__ if _registered(OWN_ARCHITECTURE).endswith(".longcat_flash") else "none"


def register_draft_model() -> None:
    """Flash-Lite's drafter has the same architecture: `mtp.LongcatFlashMTP` hands it to vLLM's own class."""
    _register(DRAFT_ARCHITECTURE, "longcat_vllm.mtp:LongcatFlashMTP")


def registered_draft_model() -> str:
    return _registered(DRAFT_ARCHITECTURE)


def _register(architecture: str, model: str) -> None:
    from vllm import ModelRegistry

    ModelRegistry.register_model(architecture, model)


def _registered(architecture: str) -> str:
    from vllm import ModelRegistry

    model = ModelRegistry.models.get(architecture)
    return str(getattr(model, "module_name", type(model).__module__))


def register_config_class() -> None:
    from transformers import CONFIG_MAPPING

    from longcat_vllm.config import LongcatFlashConfig

    CONFIG_MAPPING.register("longcat_flash", LongcatFlashConfig, exist_ok=True)


def registered_config_class() -> str:
    from transformers import CONFIG_MAPPING

    return str(CONFIG_MAPPING["longcat_flash"].__module__)


def register_architecture() -> None:
    from vllm.transformers_utils.config import _ARCHITECTURE_TO_MODEL_TYPE

    for architecture in ARCHITECTURES:
        _ARCHITECTURE_TO_MODEL_TYPE.setdefault(architecture, "longcat_flash")


def registered_architecture() -> str:
    from vllm.transformers_utils.config import _ARCHITECTURE_TO_MODEL_TYPE

    return __name__ if set(ARCHITECTURES) <= _ARCHITECTURE_TO_MODEL_TYPE.keys() else "none"


def register_config_check() -> None:
    """
    Raises:
        RuntimeError: if the table has an entry that is not ours, which should be called too.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class LongcatFlashForCausalLMConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            from longcat_vllm import deployment

            deployment.check(vllm_config)

    entry = MODELS_CONFIG_MAP.setdefault(ARCHITECTURE, LongcatFlashForCausalLMConfig)
    if entry.__module__ != __name__:
        raise RuntimeError(f"{entry.__module__}.{entry.__qualname__} is registered already, wanted no entry")


def registered_config_check() -> str:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    return str(getattr(MODELS_CONFIG_MAP.get(ARCHITECTURE), "__module__", "none"))


def register_chat_template() -> None:
    from vllm.transformers_utils.chat_templates import registry

    if registered_chat_template() != __name__:  # vLLM warns of a second time
        registry.register_chat_template_fallback_path("longcat_flash", _chat_template)


def registered_chat_template() -> str:
    from vllm.transformers_utils.chat_templates import registry

    found = registry._MODEL_TYPE_TO_CHAT_TEMPLATE_FALLBACK.get("longcat_flash")
    return str(getattr(found, "__module__", "none"))


@cache
def _chat_template(tokenizer: str) -> Path:
    """By the tokens of a tokenizer, given by name or directory: LongCat's templates have one model type."""
    from vllm.tokenizers import get_tokenizer

    from longcat_core.chat.templates import choose

    return choose(get_tokenizer(tokenizer).get_vocab()).path


def register_tool_parser() -> None:
    """A class that vLLM has loaded under the name comes before ours in its table, and goes."""
    from vllm.tool_parsers import ToolParserManager

    ToolParserManager.register_lazy_module(PARSER, CHAT, "LongcatToolParser")
    if registered_tool_parser() != CHAT:
        del ToolParserManager.tool_parsers[PARSER]


def registered_tool_parser() -> str:
    from vllm.tool_parsers import ToolParserManager

    return _registered_parser(ToolParserManager.tool_parsers, ToolParserManager.lazy_parsers)


def register_reasoning_parser() -> None:
    from vllm.reasoning import ReasoningParserManager

    ReasoningParserManager.register_lazy_module(PARSER, CHAT, "LongcatReasoningParser")


def registered_reasoning_parser() -> str:
    from vllm.reasoning import ReasoningParserManager

    return _registered_parser(ReasoningParserManager.reasoning_parsers, ReasoningParserManager.lazy_parsers)


def _registered_parser(loaded: Mapping[str, type], lazy: Mapping[str, tuple[str, str]]) -> str:
    return loaded[PARSER].__module__ if PARSER in loaded else lazy.get(PARSER, ("none", ""))[0]


def register_fingerprint() -> None:
    """An attribute of serving objects: a descriptor of their class comes before what they have."""
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    from longcat_vllm.dial import FingerprintWithTarget

    GenerateBaseServing.system_fingerprint = FingerprintWithTarget()  # type: ignore[assignment]  # of type str | None


def registered_fingerprint() -> str:
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    return type(vars(GenerateBaseServing).get("system_fingerprint")).__module__
