"""Entries in SGLang's tables: how the rows of `hooks.HOOKS` make them and look them up."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from longcat_core.config import ConfigError
from longcat_core.plugin.engine import UnsupportedEngineError
from longcat_core.plugin.hooks import Around
from longcat_sglang.engine import CPU_ATTENTION, is_longcat

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import ServerArgs

_RESOLUTION_STEP = "handle_model_specific_adjustments"


def register_around(target: str, around: Around) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if around not in [registered for _, registered, _ in HookRegistry._hooks.get(target, ())]:
        HookRegistry.register(target, around, HookType.AROUND)


def module_around(target: str) -> str:
    """The module of our wrapper, if SGLang has applied it."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    ours = [around.__module__ for _, around, _ in HookRegistry._hooks.get(target, ()) if _is_ours(around)]
    return ours[0] if ours and target in HookRegistry._patched else "none"


def _is_ours(around: Callable[..., Any]) -> bool:
    return around.__module__.startswith("longcat_")


def register_config_class() -> None:
    from sglang.srt.utils.hf_transformers import common

    from longcat_sglang.config import LongcatFlashConfig

    common._CONFIG_REGISTRY["longcat_flash"] = LongcatFlashConfig


def registered_config_class() -> str:
    from sglang.srt.utils.hf_transformers import common

    return str(common._CONFIG_REGISTRY["longcat_flash"].__module__)


def register_config_check() -> None:
    from sglang.srt.arg_groups import resolution_hooks

    if _check_after_adjustments not in resolution_hooks._HOOKS.get(_RESOLUTION_STEP, []):
        resolution_hooks.register_resolution_hook(_RESOLUTION_STEP)(_check_after_adjustments)


def registered_config_check() -> str:
    from sglang.srt.arg_groups import resolution_hooks

    return __name__ if _check_after_adjustments in resolution_hooks._HOOKS.get(_RESOLUTION_STEP, []) else "none"


def _check_after_adjustments(server_args: ServerArgs, previous: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Check a LongCat's deployment and checkpoint, and set what follows from them."""
    previous(server_args, *args, **kwargs)
    if _serves_longcat(server_args):
        from longcat_sglang import deployment

        deployment.settle(server_args)


def _serves_longcat(server_args: ServerArgs) -> bool:
    """Raises only what our own reading of a LongCat's configuration raises: another model may have none yet."""
    from sglang.srt.arg_groups.overrides import model_config_of

    try:
        return is_longcat(model_config_of(server_args).hf_config)
    except (ConfigError, UnsupportedEngineError):
        raise
    except Exception:
        return False


def register_attention_backend() -> None:
    from sglang.srt.layers.attention import attention_registry

    stock = attention_registry.ATTENTION_BACKENDS[CPU_ATTENTION]
    if getattr(stock, "__module__", None) == __name__:
        return

    def create(runner: ModelRunner) -> AttentionBackend:
        if not is_longcat(runner.model_config.hf_config):
            return stock(runner)
        from longcat_sglang.devices.cpu.attention import LatentAttentionBackend

        return LatentAttentionBackend(runner)

    attention_registry.register_attention_backend(CPU_ATTENTION)(create)


def registered_attention_backend() -> str:
    from sglang.srt.layers.attention import attention_registry

    return str(attention_registry.ATTENTION_BACKENDS[CPU_ATTENTION].__module__)


def our_model_class(
    original: Callable[..., tuple[type, str]], model_config: ModelConfig, *args: Any, **kwargs: Any
) -> tuple[type, str]:
    """Our model where the configuration is ours, or our MTP layer where SGLang builds a drafter."""
    _, architecture = original(model_config, *args, **kwargs)
    if model_config.is_draft_model:
        from longcat_sglang.mtp import LongcatFlashMTP

        return LongcatFlashMTP, architecture
    from longcat_sglang.model import LongcatFlashForCausalLM

    return LongcatFlashForCausalLM, architecture
