"""All that the plugin tells vLLM, on one screen."""

from __future__ import annotations


def register() -> None:
    """Entry point `vllm.general_plugins`: runs in every process of vLLM, whatever model it serves.

    Harmless when called again. Never raises: what could not be hooked is logged once by name, and becomes an error
    when a LongCat model is asked for (`Engine.require_supported`).
    """
    from longcat_vllm import compat

    compat.VLLM.hook("model class", _register_model)
    compat.VLLM.hook("configuration class", compat.install_config_class)
    compat.VLLM.hook("checkpoint check", compat.install_config_check)
    compat.VLLM.hook("draft model class", _register_draft_model)


def register_platform() -> str | None:
    """Entry point `vllm.platform_plugins`: ours on a CPU, else None, so that vLLM chooses as ever."""
    from vllm.platforms import cpu_platform_plugin

    return "longcat_vllm.platform.LongcatCpuPlatform" if cpu_platform_plugin() else None


def _register_model() -> None:
    from vllm import ModelRegistry

    from longcat_vllm.compat import ARCHITECTURE

    ModelRegistry.register_model(ARCHITECTURE, "longcat_vllm.model:LongcatFlashForCausalLM")


def _register_draft_model() -> None:
    from vllm import ModelRegistry

    from longcat_vllm.compat import DRAFT_ARCHITECTURE, VLLM

    if not VLLM.is_supported() or VLLM.failures:
        return  # Flash-Lite's drafter has the same architecture, and is vLLM's own where ours cannot be imported
    ModelRegistry.register_model(DRAFT_ARCHITECTURE, "longcat_vllm.mtp:LongcatFlashMTP")
