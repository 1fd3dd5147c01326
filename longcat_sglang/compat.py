"""What is changed in SGLang, piece by piece: why, since which version, and when it can go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet

from longcat_core.engine import Engine, UnsupportedEngineError

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.plugins.hook_registry import HookType
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative.draft_utils import DraftBackendFactory
    from sglang.srt.speculative.eagle_info import EagleVerifyInput
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

ARCHITECTURE = "LongcatFlashForCausalLM"
SGLANG = Engine(
    name="SGLang",
    distributions=("sglang",),
    supported=SpecifierSet("==0.5.21.*"),  # 0.5.22 has another interface of layer boundaries
    supported_text="0.5.21",
)
CPU_ATTENTION = "torch_native"
"""The name under which our attention backend is chosen on a CPU: it is the one that SGLang takes to need no Triton and
no graph (`support_triton`, arg_groups/attention_hook.py). For other models it stays SGLang's own."""


MODEL_CLASS_TARGET = "sglang.srt.model_loader.utils.get_model_architecture"
PROMPT_CHECK_TARGET = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"
DRAFT_DECODING_TARGET = "sglang.srt.speculative.draft_utils.DraftBackendFactory.create_decode_backend"
DRAFT_EXTENDING_TARGET = "sglang.srt.speculative.draft_utils.DraftBackendFactory.create_draft_extend_backend"
VERIFICATION_TARGET = "sglang.srt.speculative.eagle_utils.eagle_sample"
WORKER_TARGET = "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker"
"""Functions of SGLang that are wrapped through its registry of hooks, after all plugins have been called."""
RESOLUTION_STEP = "handle_model_specific_adjustments"


def hooked() -> dict[str, str]:
    """Each hook's name, and the module of what is there: ours, if it took. SGLang only logs it if one does not."""
    from sglang.srt.arg_groups import resolution_hooks
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.utils.hf_transformers import common

    def applied(target: str) -> str:
        return __name__ if target in HookRegistry._patched else "none"

    checks = resolution_hooks._HOOKS.get(RESOLUTION_STEP, [])
    return {
        "model class": applied(MODEL_CLASS_TARGET),
        "configuration class": common._CONFIG_REGISTRY["longcat_flash"].__module__,
        "checkpoint check": __name__ if _check_after_adjustments in checks else "none",
        "attention backend": attention_registry.ATTENTION_BACKENDS[CPU_ATTENTION].__module__,
        "prompt check": applied(PROMPT_CHECK_TARGET),
        "draft attention": applied(DRAFT_DECODING_TARGET),
        "draft attention, extending": applied(DRAFT_EXTENDING_TARGET),
        "sampled verification": applied(VERIFICATION_TARGET),
        "draft gate": applied(WORKER_TARGET),
    }


def require_supported() -> None:
    """`Engine.require_supported`, and that every hook took.

    Raises:
        UnsupportedEngineError: naming what is wrong and what to do.
    """
    SGLANG.require_supported()
    missing = [name for name, module in hooked().items() if not module.startswith("longcat_sglang")]
    if missing:
        raise UnsupportedEngineError(
            f"longcat-serving's hooks into SGLang {SGLANG.version()} are not in place: {', '.join(missing)}; "
            f"run `longcat doctor`, and see SGLang's log"
        )


def _hook_once(target: str, hook: Callable[..., Any], kind: HookType) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    if hook not in [registered for _, registered, _ in HookRegistry._hooks.get(target, ())]:
        HookRegistry.register(target, hook, kind)


def install_model_class() -> None:
    """Build our model where the configuration is ours, or our MTP layer where SGLang builds a drafter.

    Without it: SGLang's own model, which does not scale zero experts (sglang#10019) and computes them as expert 0.
    Not through `ModelRegistry.register`, which imports every model there is, in every process, and would give us
    Flash-Lite too, to which SGLang gives the same architecture.
    Remove when: `ModelRegistry` takes a class by name, and Flash-Lite has an architecture of its own.
    """
    from sglang.srt.plugins.hook_registry import HookType

    _hook_once(MODEL_CLASS_TARGET, _ours_where_the_config_is, HookType.AROUND)


def _ours_where_the_config_is(
    original: Callable[[ModelConfig], tuple[type, str]], model_config: ModelConfig
) -> tuple[type, str]:
    model_class, architecture = original(model_config)
    if not is_longcat(model_config.hf_config):
        return model_class, architecture
    if model_config.is_draft_model:
        from longcat_sglang.mtp import LongcatFlashMTP

        return LongcatFlashMTP, architecture
    from longcat_sglang.model import LongcatFlashForCausalLM

    return LongcatFlashForCausalLM, architecture


def install_config_class() -> None:
    """Read `config.json` in every published spelling, and refuse what is no LongCat-Flash.

    Without it: SGLang takes the `num_hidden_layers` that transformers saves, which is twice the layers, and puts the
    560 B model's sizes in for whatever is missing.
    Remove when: SGLang's LongcatFlashConfig reads both spellings and has no size defaults.
    """
    from sglang.srt.utils.hf_transformers import common

    from longcat_sglang.config import LongcatFlashConfig

    common._CONFIG_REGISTRY["longcat_flash"] = LongcatFlashConfig


def install_config_check() -> None:
    """Check deployment and checkpoint before any process of the engine starts, and choose attention on a CPU.

    Through SGLang's hooks for steps of its argument resolution, which are there for plugins.
    """
    from sglang.srt.arg_groups import resolution_hooks

    if _check_after_adjustments not in resolution_hooks._HOOKS.get(RESOLUTION_STEP, []):
        resolution_hooks.register_resolution_hook(RESOLUTION_STEP)(_check_after_adjustments)


def _check_after_adjustments(server_args: ServerArgs, previous: Callable[[ServerArgs], None]) -> None:
    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view

    from longcat_sglang import deployment

    previous(server_args)
    settings = resolving_view(server_args)
    hf_config = model_config_of(server_args).hf_config
    if not is_longcat(hf_config):
        return
    deployment.check(server_args, settings, hf_config)
    if settings.device == "cpu":
        declare_resolution(server_args, "longcat-serving", attention_backend=CPU_ATTENTION)
    drafts_some = settings.speculative_num_steps is not None
    if deployment.drafts_with_mtp(settings) and drafts_some and settings.speculative_eagle_topk is None:
        # SGLang compares it with 1 whether it is there or not (arg_groups/speculative_hook.py).
        declare_resolution(server_args, "longcat-serving", speculative_eagle_topk=1)


def install_attention_backend() -> None:
    """Give a LongCat model on a CPU our attention backend, under the name of the one that SGLang would take.

    Without it: SGLang's torch_native backend takes MLA's queries for those of plain attention.
    Remove when: it has MLA, in latent space and for any sizes.
    """
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


def install_draft_attention() -> None:
    """Give the drafter of a LongCat model on a CPU our attention backend too.

    Without it: SGLang has a list of backends that can draft, and refuses ours ("EAGLE is not supported in decode
    attention backend torch_native").
    Remove when: `DraftBackendFactory` asks the registry of attention backends.
    """
    from sglang.srt.plugins.hook_registry import HookType

    _hook_once(DRAFT_DECODING_TARGET, _our_drafting_backend, HookType.AROUND)
    _hook_once(DRAFT_EXTENDING_TARGET, _no_backend_beside_ours, HookType.AROUND)


def _our_drafting_backend(original: Callable[[DraftBackendFactory], Any], factory: DraftBackendFactory) -> Any:
    if not _attends_with_ours(factory.draft_model_runner) or factory.speculative_num_steps < 2:
        return original(factory)
    from longcat_sglang.attention import DraftingBackend

    select_drafts_without_a_compiler()
    return DraftingBackend(factory.draft_model_runner, factory.topk, factory.speculative_num_steps)


def _no_backend_beside_ours(original: Callable[[DraftBackendFactory], Any], factory: DraftBackendFactory) -> Any:
    """None is what makes SGLang's worker use the drafter's own backend, which is ours already."""
    return None if _attends_with_ours(factory.draft_model_runner) else original(factory)


def _attends_with_ours(runner: ModelRunner) -> bool:
    if not is_longcat(runner.model_config.hf_config):
        return False
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


def reserve_slots_for_drafts() -> None:
    """Called when a LongCat model is built: as many columns for a request's slots as a step with drafts reserves.

    Without it: on a CPU a request that comes near the end of the context ends the server, if there are many drafts, as
    `get_req_to_token_extra_context_len` counts what is reserved only for pages of more than one token
    (mem_cache/allocation_sizing.py). On CUDA the slots go into the next request's row.
    Remove when: it counts it for pages of one token too.
    """
    from sglang.srt.mem_cache import allocation_sizing, kv_cache_configurator

    stock = kv_cache_configurator.get_req_to_token_extra_context_len
    if stock.__module__ == __name__:
        return

    def with_what_is_reserved() -> int:
        return max(stock(), allocation_sizing.get_alloc_reserve_per_decode())

    kv_cache_configurator.get_req_to_token_extra_context_len = with_what_is_reserved


def install_sampled_verification() -> None:
    """Verify the drafts of requests that sample by sampling, on a CPU.

    Without it: they are answered greedily, whatever their temperature: `_verify_uses_greedy` takes the greedy path for
    every request on a CPU.
    Remove when: `eagle_sample` samples on a CPU.
    """
    from sglang.srt.plugins.hook_registry import HookType

    _hook_once(VERIFICATION_TARGET, _sample_where_requests_do, HookType.AROUND)


def _sample_where_requests_do(
    original: Callable[..., Any],
    draft: EagleVerifyInput,
    batch: ScheduleBatch,
    logits_output: LogitsProcessorOutput,
    *rest: Any,
    **named: Any,
) -> Any:
    """`original` also applies penalties, biases and grammars, in place, so that it is called in any case."""
    greedy = original(draft, batch, logits_output, *rest, **named)
    is_ours = batch.device == "cpu" and is_longcat(batch.model_config.hf_config)
    if not is_ours or batch.forward_mode.is_idle() or batch.sampling_info.is_all_greedy:
        return greedy
    from longcat_sglang.sampled_verification import verify_sampled

    return verify_sampled(draft, batch, logits_output)


def install_draft_gate() -> None:
    """Draft with a worker that verifies only what passes the gate, where a LongCat checkpoint has one.

    Without it: all drafts are verified. A class of its own for an algorithm of our own would need another flag than the
    stock one.
    Remove when: a draft model can say how many of its drafts are to be verified.
    """
    from sglang.srt.plugins.hook_registry import HookType

    _hook_once(WORKER_TARGET, _gated_where_there_is_a_gate, HookType.AROUND)


def _gated_where_there_is_a_gate(
    original: Callable[[SpeculativeAlgorithm, ServerArgs], type],
    algorithm: SpeculativeAlgorithm,
    server_args: ServerArgs,
) -> type:
    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view

    from longcat_core import drafting
    from longcat_sglang import deployment

    worker = original(algorithm, server_args)
    if not algorithm.is_eagle() or not is_longcat(model_config_of(server_args).hf_config):
        return worker
    has_gate = (Path(server_args.model_path) / drafting.GATE_FILE).exists()  # which `deployment.check` has read
    if not has_gate or deployment.obstacles_to_gate(resolving_view(server_args)):
        return worker
    from longcat_sglang.speculation import GatedWorker

    return GatedWorker


def install_prompt_check() -> None:
    """Refuse a prompt with a token outside the vocabulary.

    Without it: one such request ends the server, as SGLang checks the number of tokens only, and the embedding of a
    token that is not there is an error in the scheduler (on CUDA, in the device).
    Remove when: `TokenizerManager._validate_one_request` checks it.
    """
    from sglang.srt.plugins.hook_registry import HookType

    _hook_once(PROMPT_CHECK_TARGET, _refuse_tokens_outside_the_vocabulary, HookType.BEFORE)


def _refuse_tokens_outside_the_vocabulary(manager: TokenizerManager, request: Any, input_ids: list[int] | None) -> None:
    if not input_ids or not is_longcat(manager.model_config.hf_config):
        return
    size = manager.model_config.vocab_size
    for token in (min(input_ids), max(input_ids)):
        if not 0 <= token < size:
            raise ValueError(f"Token id {token} is out of vocabulary, wanted one of 0 to {size - 1}")


def is_longcat(hf_config: Any) -> bool:
    """Whether it is a LongCat-Flash that is ours to serve."""
    return hasattr(hf_config, "longcat")
