"""All that the plugin tells vLLM, on one screen."""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger("vllm.longcat")


def register() -> None:
    """Entry point `vllm.general_plugins`: runs in every process of vLLM, whatever model it serves.

    Harmless when called again. Never raises: what could not be hooked is logged once by name, and becomes an error
    when a LongCat model is asked for (`compat.require_supported`).
    """
    from longcat_vllm import compat

    _hook("model class", _register_model)
    _hook("configuration class", compat.install_config_class)
    _hook("checkpoint check", compat.install_config_check)


def platform() -> str | None:
    """Entry point `vllm.platform_plugins`: ours on a CPU, else None, so that vLLM chooses as ever."""
    from vllm.platforms import cpu_platform_plugin

    return "longcat_vllm.platform.LongcatCpuPlatform" if cpu_platform_plugin() else None


def _register_model() -> None:
    from vllm import ModelRegistry

    from longcat_vllm.compat import ARCHITECTURE

    ModelRegistry.register_model(ARCHITECTURE, "longcat_vllm.model:LongcatFlashForCausalLM")


def _hook(name: str, install: Callable[[], None]) -> None:
    from longcat_vllm.compat import hook_failures

    try:
        install()
        hook_failures.pop(name, None)
    except Exception as error:  # a broken hook must not take down another model's server
        if name not in hook_failures:
            logger.warning("longcat-serving could not hook its %s into vLLM: %r", name, error)
        hook_failures[name] = repr(error)
