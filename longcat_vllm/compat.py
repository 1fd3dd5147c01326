"""What the rows of `hooks.HOOKS` put into vLLM; why, and until when, is said there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from longcat_core.family import ARCHITECTURE, ARCHITECTURES
from longcat_core.hooks import Stage
from longcat_vllm.engine import DRAFT_ARCHITECTURE, OWN_ARCHITECTURE, VLLM, drafts_with_mtp
from longcat_vllm.hooks import HOOKS

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.v1.spec_decode.eagle import EagleProposer
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner


def require_supported() -> None:
    """Raise UnsupportedEngineError unless this vLLM is one that we know, with our hooks in place."""
    VLLM.require_supported(HOOKS)


def mend_for_longcat(stage: Stage) -> None:
    """Called when a LongCat model is about to be served, or is built in this process."""
    from vllm.platforms import current_platform

    VLLM.install(HOOKS, stage, current_platform.device_type)
    require_supported()


# -- entries of vLLM's tables --------------------------------------------------------------------------


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
        RuntimeError: if the table has an entry that is not ours, which would have to be called as well.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class LongcatFlashForCausalLMConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            from longcat_vllm import deployment

            deployment.check(vllm_config)

    entry = MODELS_CONFIG_MAP.setdefault(ARCHITECTURE, LongcatFlashForCausalLMConfig)
    if entry.__module__ != __name__:
        raise RuntimeError(f"{entry.__module__}.{entry.__qualname__} is there already, wanted no entry")


def registered_config_check() -> str:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    return str(getattr(MODELS_CONFIG_MAP.get(ARCHITECTURE), "__module__", "none"))


# -- wrappers of vLLM's functions ----------------------------------------------------------------------


def keep_scheduling_settings(
    original: Callable[..., None], platform: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any
) -> None:
    """Chunked prefill, prefix caching and the block size as they were set."""
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    chunked, prefix = scheduler.enable_chunked_prefill, cache.enable_prefix_caching
    budget = scheduler.max_num_batched_tokens
    block_size = cache.block_size if cache.user_specified_block_size else None
    original(platform, vllm_config, *args, **kwargs)
    scheduler.enable_chunked_prefill, cache.enable_prefix_caching = chunked, prefix
    scheduler.max_num_batched_tokens = budget
    if block_size is not None:
        cache.block_size = block_size
    if drafts_with_mtp(vllm_config):
        # Padded batches save a synchronisation that a CPU has not. They draft over rejected tokens too, and take the
        # prompt's last token for the one that follows a chunk (prepare_next_token_ids_padded in 0.32).
        vllm_config.speculative_config.disable_padded_drafter_batch = True


def sample_without_discarded_requests(
    original: Callable[..., Any], runner: CPUModelRunner, *args: Any, **kwargs: Any
) -> Any:
    """Keep a seeded request's generator out of the sampling of a chunk whose token is thrown away."""
    generators: dict[int, torch.Generator] = runner.input_batch.generators
    discarded = {row: generators.pop(row) for row in list(generators) if runner.discard_request_mask.np[row]}
    try:
        return original(runner, *args, **kwargs)
    finally:
        generators.update(discarded)


def expand_on_a_cpu(
    _original: Callable[..., torch.Tensor],
    values: torch.Tensor,
    ends: torch.Tensor,
    num_tokens: int,
    replace_from: float = 0,
    replace_to: float = 0,
) -> torch.Tensor:
    """Repeat values [B] up to each one's end in ends [B], with `replace_from` replaced: [num_tokens]."""
    replaced = values.masked_fill(values == replace_from, replace_to)
    return replaced.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)), output_size=num_tokens)


def constrain_drafts_there_are(
    original: Callable[..., torch.Tensor], logits: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """logits: [drafts, vocabulary]."""
    return original(logits, *args, **kwargs) if len(logits) else logits


def shrink_with_adapters_only(
    original: Callable[..., None], punica: PunicaWrapperCPU, shrunk: torch.Tensor, *args: Any, **kwargs: Any
) -> None:
    """shrunk: [T, rank], which is multiplied with B next, and added to what the layer gives without adapters."""
    original(punica, shrunk, *args, **kwargs)
    shrunk[punica.token_lora_indices < 0] = 0


def prepare_with_lengths_of_its_own(
    original: Callable[..., Any], proposer: EagleProposer, *args: Any, **kwargs: Any
) -> Any:
    metadata, token_indices = original(proposer, *args, **kwargs)
    metadata.seq_lens = metadata.seq_lens.clone()
    return metadata, token_indices


def propose_what_passes(original: Callable[..., Any], proposer: EagleProposer, *args: Any, **kwargs: Any) -> Any:
    """Hand on the drafts that the draft model's gate lets pass. The runner takes drafts of different lengths, as
    n-grams have them."""
    gated = getattr(proposer.model, "gated_drafts", None)
    if gated is None:
        return original(proposer, *args, **kwargs)
    gated.begin()
    return gated.passed(original(proposer, *args, **kwargs))
