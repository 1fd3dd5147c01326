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
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.plugins.hook_registry import HookType
    from sglang.srt.server_args import ServerArgs

ARCHITECTURE = "LongcatFlashForCausalLM"
SGLANG = Engine(
    name="SGLang",
    distributions=("sglang",),
    supported=SpecifierSet(">=0.5.21,<0.5.24"),
    supported_text="0.5.21 to 0.5.23",
)
CPU_ATTENTION = "torch_native"
"""The name under which our attention backend is chosen on a CPU: it is the one that SGLang takes to need no Triton and
no graph (`support_triton`, arg_groups/attention_hook.py). For other models it stays SGLang's own."""


MODEL_CLASS_TARGET = "sglang.srt.model_loader.utils.get_model_architecture"
PROMPT_CHECK_TARGET = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"
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
    """Build our model where the configuration is ours.

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
    if is_longcat(model_config.hf_config):
        from longcat_sglang.model import LongcatFlashForCausalLM

        return LongcatFlashForCausalLM, architecture
    return model_class, architecture


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

    previous(server_args)
    settings = resolving_view(server_args)
    hf_config = model_config_of(server_args).hf_config
    if not is_longcat(hf_config):
        return
    check_deployment(server_args, settings, hf_config)
    if settings.device == "cpu":
        declare_resolution(server_args, "longcat-serving", attention_backend=CPU_ATTENTION)


def check_deployment(server_args: Any, settings: Any, hf_config: Any) -> None:
    """Raise for what LongCat-Flash cannot be served with: ValueError, or CheckpointError for a local checkpoint.

    server_args: what the user gave; settings: what SGLang made of it so far.
    """
    from longcat_core import checkpoint

    require_supported()
    problems = _unsupported(server_args, settings, hf_config)
    if problems:
        raise ValueError("LongCat-Flash cannot be served like this:\n  " + "\n  ".join(problems))
    directory = Path(settings.model_path)
    if directory.is_dir() and settings.load_format != "dummy":
        checkpoint.verify(directory, hf_config.longcat)


def _unsupported(server_args: Any, settings: Any, hf_config: Any) -> list[str]:
    """Options that SGLang would accept for LongCat-Flash and then get wrong, each with what to do."""
    longcat, problems = hf_config.longcat, []
    quantization = settings.quantization or (longcat.is_quantized and hf_config.quantization_config.get("quant_method"))
    if quantization:
        problems.append(
            f"quantization: {quantization!r}, wanted none so far; "
            "give a bfloat16 or float32 checkpoint, and leave --quantization out"
        )
    if settings.device == "cpu":
        wanted = (None, "auto", CPU_ATTENTION)
        for option in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
            given = getattr(server_args, option)
            if given not in wanted:
                problems.append(f"{option}: {given!r}, wanted our own on a CPU; leave --{option.replace('_', '-')} out")
        if settings.kv_cache_dtype.startswith("fp"):
            problems.append(f"kv_cache_dtype: {settings.kv_cache_dtype!r}, wanted 'auto' on a CPU")
        if server_args.page_size not in (None, 1):
            problems.append(f"page_size: {server_args.page_size}, wanted 1 on a CPU: SGLang's pages need Triton")
        if settings.enable_dp_attention:
            problems.append("data-parallel attention on a CPU is not there yet; leave --enable-dp-attention out")
        if settings.enable_torch_compile:
            problems.append("torch.compile on a CPU is not there yet; leave --enable-torch-compile out")
    elif settings.moe_runner_backend not in SKIP_ZERO_EXPERTS:
        problems.append(
            f"moe_runner_backend: {settings.moe_runner_backend!r} is not known to skip zero experts, "
            f"wanted one of {', '.join(SKIP_ZERO_EXPERTS)}"
        )
    if settings.pp_size > 1:
        problems.append(
            f"pp_size: {settings.pp_size}, wanted 1; SGLang's layer boundaries have no pipeline for LongCat"
        )
    if longcat.num_attention_heads % settings.tp_size:
        problems.append(f"tp_size: {settings.tp_size}, wanted a divisor of the {longcat.num_attention_heads} heads")
    if longcat.n_routed_experts % settings.ep_size:
        problems.append(f"ep_size: {settings.ep_size}, wanted a divisor of the {longcat.n_routed_experts} FFN experts")
    speculation = settings.speculative_algorithm
    if speculation not in ((None,) if settings.device == "cpu" else (None, "NGRAM")):
        problems.append(f"speculative_algorithm: {speculation!r} is not there yet; leave it out, or use NGRAM on CUDA")
    if settings.enable_eplb:
        problems.append(
            "expert load balancing (EPLB) is not there yet: SGLang looks each id up in tables of FFN experts, "
            "where a zero expert's -1 is the last one; leave --enable-eplb out"
        )
    return problems


SKIP_ZERO_EXPERTS = ("auto", "triton", "deep_gemm")
"""SGLang's MoE runners that were read to skip ids of -1."""


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
