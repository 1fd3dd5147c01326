"""What the rows of `hooks.HOOKS` put into SGLang; why, and until when, is said there."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from longcat_core.config import ConfigError
from longcat_core.plugin.engine import UnsupportedEngineError, tell_of_own_class
from longcat_core.plugin.hooks import Around, Stage
from longcat_core.weights.audit import CheckpointError
from longcat_sglang.engine import CPU_ATTENTION, OWN_CLASS, SGLANG, is_longcat
from longcat_sglang.hooks import HOOKS

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative.draft_utils import DraftBackendFactory
    from sglang.srt.speculative.eagle_info import EagleVerifyInput
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    from torch import Tensor

_RESOLUTION_STEP = "handle_model_specific_adjustments"


def require_supported() -> None:
    """Raise UnsupportedEngineError unless this SGLang is one that we know, with our hooks in place; it only logs it if
    one of them does not take."""
    SGLANG.require_supported(HOOKS)


def mend_for_longcat(stage: Stage) -> None:
    """Called when a LongCat model is about to be served, or is built in this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.utils import get_device

    SGLANG.install(HOOKS, stage, get_device().partition(":")[0])
    HookRegistry.apply_hooks()  # as SGLang has done with what was registered while it loaded its plugins
    require_supported()


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


# -- entries of SGLang's tables ------------------------------------------------------------------------


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
    """Check a LongCat's deployment and checkpoint, and choose its attention on a CPU."""
    previous(server_args, *args, **kwargs)
    if not _serves_longcat(server_args):
        return
    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view

    from longcat_sglang import deployment

    settings, hf_config = resolving_view(server_args), model_config_of(server_args).hf_config
    if reasons := deployment.reasons_for_sglangs_own_class(settings, hf_config):
        tell_of_own_class("SGLang", reasons, deployment.LOST, deployment.logger)
        # Every process of SGLang reads the configuration again, and these with it.
        overrides = {**json.loads(settings.json_model_override_args), OWN_CLASS: True}
        declare_resolution(server_args, "longcat-serving", json_model_override_args=json.dumps(overrides))
        setattr(hf_config, OWN_CLASS, True)
        return
    deployment.check(server_args, settings, hf_config)
    if settings.device == "cpu":
        declare_resolution(server_args, "longcat-serving", attention_backend=CPU_ATTENTION)
    drafts_some = settings.speculative_num_steps is not None
    if deployment.drafts_with_mtp(settings) and drafts_some and settings.speculative_eagle_topk is None:
        # SGLang compares it with 1 whether it is there or not (arg_groups/speculative_hook.py).
        declare_resolution(server_args, "longcat-serving", speculative_eagle_topk=1)


def _serves_longcat(server_args: ServerArgs) -> bool:
    """Raises only what our own reading of a LongCat's configuration raises: of another model there may be none yet."""
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
        from longcat_sglang.attention import LatentAttentionBackend

        return LatentAttentionBackend(runner)

    attention_registry.register_attention_backend(CPU_ATTENTION)(create)


def registered_attention_backend() -> str:
    from sglang.srt.layers.attention import attention_registry

    return str(attention_registry.ATTENTION_BACKENDS[CPU_ATTENTION].__module__)


# -- wrappers of SGLang's functions --------------------------------------------------------------------


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


def read_again_as_overridden(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    config = original(*args, **kwargs)
    return config.overridden(kwargs["model_override_args"]) if is_longcat(config) else config


def refuse_tokens_outside_the_vocabulary(
    original: Callable[..., None], scheduler: Scheduler, request: Req, *args: Any, **kwargs: Any
) -> None:
    """As SGLang refuses a prompt that is too long: the request ends with a status of 400 before it runs."""
    size, tokens = scheduler.model_config.vocab_size, request.origin_input_ids
    wrong = [token for token in (min(tokens), max(tokens)) if not 0 <= token < size] if tokens else []
    if wrong and request.to_finish is None:
        request.set_finish_with_abort(f"Token id {wrong[0]} is out of vocabulary, wanted one of 0 to {size - 1}")
    original(scheduler, request, *args, **kwargs)


def our_drafting_backend(original: Callable[..., Any], factory: DraftBackendFactory, *args: Any, **kwargs: Any) -> Any:
    if not _attends_with_ours(factory.draft_model_runner) or factory.speculative_num_steps < 2:
        return original(factory, *args, **kwargs)
    from longcat_sglang.attention import DraftingBackend

    select_drafts_without_a_compiler()
    return DraftingBackend(factory.draft_model_runner, factory.topk, factory.speculative_num_steps)


def no_backend_beside_ours(
    original: Callable[..., Any], factory: DraftBackendFactory, *args: Any, **kwargs: Any
) -> Any:
    """None is what makes SGLang's worker use the drafter's own backend, which is ours already."""
    return None if _attends_with_ours(factory.draft_model_runner) else original(factory, *args, **kwargs)


def _attends_with_ours(runner: ModelRunner) -> bool:
    from longcat_sglang.attention import LatentAttentionBackend

    return isinstance(runner.attn_backend, LatentAttentionBackend)


def select_drafts_without_a_compiler() -> None:
    """Run in plain PyTorch what SGLang compiles, in a process that drafts for LongCat on a CPU.

    Without it: the first answer of a server with two drafts or more waits 16 s for `torch.compile`, which needs a C++
    compiler, for a few operations on tensors of a few numbers.
    Remove when: `_select_top_k_tokens_later` is not compiled on a CPU (speculative/spec_utils.py).
    """
    from sglang.srt.speculative import spec_utils

    compiled = spec_utils._select_top_k_tokens_later
    spec_utils._select_top_k_tokens_later = getattr(compiled, "_torchdynamo_orig_callable", compiled)


def sample_where_requests_do(
    original: Callable[..., Any],
    draft: EagleVerifyInput,
    batch: ScheduleBatch,
    logits_output: LogitsProcessorOutput,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`original` also applies biases and grammars, in place, so that it is called in any case."""
    if not batch.forward_mode.is_idle():
        _transform_at_every_node(draft, batch.sampling_info, logits_output.next_token_logits)
    greedy = original(draft, batch, logits_output, *args, **kwargs)
    if batch.device != "cpu" or batch.forward_mode.is_idle() or batch.sampling_info.is_all_greedy:
        return greedy
    from longcat_sglang.sampled_verification import verify_sampled

    return verify_sampled(draft, batch, logits_output)


def _transform_at_every_node(draft: EagleVerifyInput, sampling: SamplingBatchInfo, logits: Tensor) -> None:
    """Penalties and custom processors, which `eagle_sample` applies as to the root of the drafts, or not at all."""
    from sglang.srt.layers.sampler import apply_custom_logit_processor

    from longcat_sglang.penalties import GeneratedTokenPenalties

    if isinstance(sampling.penalizer_orchestrator, GeneratedTokenPenalties):
        sampling.penalizer_orchestrator.apply(logits, draft)
    if sampling.has_custom_logit_processor:
        apply_custom_logit_processor(logits, sampling, num_tokens_in_batch=draft.draft_token_num)


def penalties_of_what_was_generated(
    original: Callable[..., SamplingBatchInfo], sampling: SamplingBatchInfo, *args: Any, **kwargs: Any
) -> SamplingBatchInfo:
    """The copy that a batch runs with. SGLang's has penalties that are added up already; this one has the tokens."""
    copy = original(sampling, *args, **kwargs)
    if not sampling.penalizer_orchestrator.is_required:
        return copy
    from longcat_sglang.penalties import GeneratedTokenPenalties

    copy.penalizer_orchestrator = GeneratedTokenPenalties.of(sampling.penalizer_orchestrator)
    copy.acc_additive_penalties = copy.acc_scaling_penalties = None
    return copy


def process_what_is_penalised(
    original: Callable[..., bool], scheduler: Scheduler, batch: ScheduleBatch | None, *args: Any, **kwargs: Any
) -> bool:
    """Whether to process the last batch's tokens before this batch runs, as SGLang does for some grammars."""
    sampling = batch.sampling_info if batch else None
    if sampling is not None and sampling.penalizer_orchestrator.is_required and scheduler.result_queue:
        return True
    return original(scheduler, batch, *args, **kwargs)


def gated_worker(
    original: Callable[..., type], algorithm: SpeculativeAlgorithm, server_args: ServerArgs, *args: Any, **kwargs: Any
) -> type:
    """A worker that verifies only what passes the draft gate, where that is asked for; `deployment.check` has seen to
    it that there is one, with nothing in its way."""
    from sglang.srt.arg_groups.overrides import model_config_of

    from longcat_sglang import deployment

    worker = original(algorithm, server_args, *args, **kwargs)
    if not algorithm.is_eagle() or not deployment.is_gate_asked_for(model_config_of(server_args).hf_config):
        return worker
    from longcat_sglang.speculation import GatedWorker

    return GatedWorker


def say_that_an_update_is_refused(
    original: Callable[..., tuple[bool, str]], updater: Any, *args: Any, **kwargs: Any
) -> tuple[bool, str]:
    """False, and the reason, where an update is not of the model's tensors."""
    try:
        return original(updater, *args, **kwargs)
    except CheckpointError as error:
        return False, str(error)


def count_what_is_reserved(original: Callable[..., int], *args: Any, **kwargs: Any) -> int:
    """As many columns for a request's slots as a step with drafts reserves."""
    from sglang.srt.mem_cache import allocation_sizing

    return max(original(*args, **kwargs), allocation_sizing.get_alloc_reserve_per_decode())
