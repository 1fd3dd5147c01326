"""Entries in SGLang's tables: how the rows of `hooks.HOOKS` make them and look them up."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longcat_core.chat.prompt import THINK_ON
from longcat_core.chat.tags import CALL_OPEN, THINK_OPEN
from longcat_core.config import ConfigError
from longcat_core.plugin.engine import UnsupportedEngineError
from longcat_core.plugin.hooks import Around, module_of_attribute, wrap_attribute
from longcat_core.plugin.imports import is_awaited, when_imported
from longcat_sglang.engine import CPU_ATTENTION, PARSER, is_longcat

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import ServerArgs

_RESOLUTION_STEP = "handle_model_specific_adjustments"
_TOOL_PARSERS = "sglang.srt.function_call.function_call_parser"
_REASONING_PARSERS = "sglang.srt.parser.reasoning_parser"
_RULES = ("sglang.srt.parser.template_detection", "sglang.srt.parser.template_manager")
"""Modules that have the rules of `auto` under names of their own."""


def register_around(target: str, around: Around) -> None:
    """Have SGLang put `around` around a function when it applies hooks, or at once where it has applied others to it:
    it passes over such a target from then on."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if around in [registered for _, registered, _ in HookRegistry._hooks.get(target, ())]:
        return
    HookRegistry.register(target, around, HookType.AROUND)
    if target in HookRegistry._patched:
        HookRegistry._apply_target(target, HookRegistry._hooks[target][-1:])


def module_around(target: str) -> str:
    """The module of our wrapper, if SGLang has put it around the function, under whatever else is around it."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    if target not in HookRegistry._patched:
        return "none"
    function = pkgutil.resolve_name(target)
    function = getattr(function, "__func__", function)
    while function is not None:
        hook = _hook_of(function)
        if hook is not None and hook.__module__.startswith("longcat_"):
            return str(hook.__module__)
        function = getattr(function, "__wrapped__", None)
    return "none"


def _hook_of(function: Any) -> Callable[..., Any] | None:
    """What a wrapper of SGLang's calls, which it has in its closure (`hook_registry._wrap_fn`); None of another one."""
    if not inspect.isfunction(function) or "hook" not in function.__code__.co_freevars:
        return None
    cells = function.__closure__ or ()
    hook: Callable[..., Any] = cells[function.__code__.co_freevars.index("hook")].cell_contents
    return hook


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


# -- parsers: SGLang's own take seconds to import, so ours are put beside them when something else imports them ------


def register_tool_parser() -> None:
    from sglang.srt.function_call.parser_names import TOOL_CALL_PARSER_NAMES

    if PARSER not in TOOL_CALL_PARSER_NAMES:
        TOOL_CALL_PARSER_NAMES.append(PARSER)
    when_imported(_TOOL_PARSERS, _put_tool_parser)


def _put_tool_parser() -> None:
    _put_reasoning_parser()  # first: as SGLang's module is imported, ours is, which then must not be half imported
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    from longcat_sglang.chat import ToolDetector

    FunctionCallParser.ToolCallParserEnum[PARSER] = ToolDetector


def registered_tool_parser() -> str:
    return _module_of_parser(_TOOL_PARSERS, "FunctionCallParser", "ToolCallParserEnum")


def register_reasoning_parser() -> None:
    from sglang.srt.parser.reasoning_parser_names import REASONING_PARSER_NAMES

    if PARSER not in REASONING_PARSER_NAMES:
        REASONING_PARSER_NAMES.append(PARSER)
    when_imported(_REASONING_PARSERS, _put_reasoning_parser)


def _put_reasoning_parser() -> None:
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    from longcat_sglang.chat import ReasoningDetector

    ReasoningParser.DetectorMap[PARSER] = ReasoningDetector


def registered_reasoning_parser() -> str:
    return _module_of_parser(_REASONING_PARSERS, "ReasoningParser", "DetectorMap")


def _module_of_parser(module: str, owner: str, table: str) -> str:
    if is_awaited(module):
        return __name__
    parsers = getattr(getattr(sys.modules.get(module), owner, None), table, {})
    return str(parsers[PARSER].__module__) if PARSER in parsers else "none"


def register_detection() -> None:
    for module in _RULES:
        when_imported(module, _put_rules)


def _put_rules() -> None:
    from sglang.srt.parser.template_detection import DetectionRule

    for module in filter(None, map(sys.modules.get, _RULES)):
        for table, concerns in (("TOOL_CALL_PARSER_RULES", writes_calls), ("REASONING_PARSER_RULES", writes_reasoning)):
            rules = getattr(module, table, None)  # none while the module is being imported
            if rules is not None and rules[0].value != PARSER:
                setattr(module, table, (DetectionRule(name=PARSER, value=PARSER, predicate=concerns), *rules))


def registered_detection() -> str:
    imported = [module for module in _RULES if not is_awaited(module)]
    if not all(module in sys.modules for module in imported):
        return "none"
    found = [sys.modules[module] for module in imported]
    firsts = [rules[0] for each in found for rules in (each.TOOL_CALL_PARSER_RULES, each.REASONING_PARSER_RULES)]
    return next((str(rule.predicate.__module__) for rule in firsts if rule.value != PARSER), __name__)


def writes_calls(context: Any) -> bool:
    """Whether a chat template, which SGLang looks at for `auto`, has LongCat's calls."""
    return CALL_OPEN in context.template


def writes_reasoning(context: Any) -> bool:
    """Whether a chat template has LongCat's reasoning, or asks for it as LongCat's do."""
    return THINK_OPEN in context.template or (THINK_ON in context.template and CALL_OPEN in context.template)


@dataclass(frozen=True)
class _Wrap:
    target: str
    around: Around

    def __call__(self) -> None:
        wrap_attribute(self.target, self.around)


def wrap_when_imported(target: str, around: Around) -> None:
    """target: a method, `module.Class.method`."""
    when_imported(target.rsplit(".", 2)[0], _Wrap(target, around))


def module_when_imported(target: str) -> str:
    module = target.rsplit(".", 2)[0]
    if is_awaited(module):
        return __name__
    return module_of_attribute(target) if module in sys.modules else "none"


def keep_tags(original: Callable[..., None], serving: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    original(serving, request, *args, **kwargs)
    request.skip_special_tokens = False
