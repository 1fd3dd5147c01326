"""Names and versions of SGLang: which are supported, and how a LongCat model is recognised."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

from packaging.specifiers import SpecifierSet

from longcat_core.plugin.engine import Engine

SGLANG = Engine(
    name="SGLang",
    distributions=("sglang",),
    supported=SpecifierSet("==0.5.21.*"),  # 0.5.22 has another interface of layer boundaries
    supported_text="0.5.21",
)
CPU_ATTENTION = "torch_native"
"""The name under which our attention backend is chosen on a CPU: it is the one of which SGLang knows that it needs no
Triton and no graph (`support_triton`, arg_groups/attention_hook.py). For other models it stays SGLang's own."""

PARSER = "longcat"
"""The name of our parsers, for --tool-call-parser and --reasoning-parser."""
MTP_ALGORITHMS = ("NEXTN", "EAGLE")
"""SGLang's names for drafting with a layer that takes the target's hidden states."""
OWN_CLASS = "longcat_own_class"
"""Field of the configuration object: true where a LongCat-Flash is left to SGLang's own class."""
OVERLAP = "longcat_overlap"
"""Another: true where a layer's MoE runs beside its dense path (`deployment.settle`)."""


def is_longcat(hf_config: Any) -> bool:
    """Whether it is a LongCat-Flash that is ours to serve."""
    return hasattr(hf_config, "longcat") and not getattr(hf_config, OWN_CLASS, False)


def algorithm_of(settings: Any) -> str | None:
    """The speculative algorithm as SGLang will spell it; NEXTN and EAGLE are the same to it."""
    return settings.speculative_algorithm and settings.speculative_algorithm.upper()


def drafts_with_mtp(settings: Any) -> bool:
    return algorithm_of(settings) in MTP_ALGORITHMS


# -- what a call of a wrapped function is about: see `longcat_core.plugin.hooks.guarded` ----------------------


def configures_longcat(model_config: Any, *_: Any, **__: Any) -> bool:
    return is_longcat(model_config.hf_config)


def overrides_fields(*_: Any, model_override_args: Any = None, **__: Any) -> bool:
    """Whether it is a LongCat's is known only after its configuration has been read."""
    return bool(model_override_args)


def schedules_longcat(scheduler: Any, *_: Any, **__: Any) -> bool:
    return is_longcat(scheduler.model_config.hf_config)


def tokenizes_for_longcat(manager: Any, *_: Any, **__: Any) -> bool:
    return is_longcat(manager.model_config.hf_config)


def responds_for_longcat(serving: Any, *_: Any, **__: Any) -> bool:
    return tokenizes_for_longcat(serving.tokenizer_manager)


def parses_longcats_reasoning(serving: Any, *_: Any, **__: Any) -> bool:
    return bool(serving.reasoning_parser == PARSER)


def drafts_for_longcat(factory: Any, *_: Any, **__: Any) -> bool:
    return is_longcat(factory.draft_model_runner.model_config.hf_config)


def verifies_longcat(_draft: Any, batch: Any, *_: Any, **__: Any) -> bool:
    return is_longcat(batch.model_config.hf_config)


def resolves_drafts_of_longcat(_processor: Any, _result: Any, batch: Any, *_: Any, **__: Any) -> bool:
    return is_longcat(batch.model_config.hf_config)


def samples_longcat(sampling: Any, *_: Any, **__: Any) -> bool:
    return is_longcat(sampling.penalizer_orchestrator.batch.model_config.hf_config)


def works_for_longcat(_algorithm: Any, server_args: Any, *_: Any, **__: Any) -> bool:
    from sglang.srt.arg_groups.overrides import model_config_of

    return is_longcat(model_config_of(server_args).hf_config)


def updates_longcat(updater: Any, *_: Any, **__: Any) -> bool:
    return type(updater.get_model()).__module__.startswith("longcat_sglang")


def is_longcats_process(*_: Any, **__: Any) -> bool:
    """For hooks that are installed only where a LongCat model is served: SGLang has one model in a process, and its
    drafter."""
    return True
