"""Wrappers of vLLM's functions for a CPU; the row of `hooks.HOOKS` that names a wrapper has the reason."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from longcat_vllm.engine import SAMPLING, mtp_speculation

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.v1.spec_decode.eagle import EagleProposer
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner


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
    if (speculation := mtp_speculation(vllm_config)) is not None:
        # Padded batches save a synchronisation, which a CPU does not need. They draft over rejected tokens too, and
        # after a chunk use the prompt's last token instead of its next (prepare_next_token_ids_padded in 0.32).
        speculation.disable_padded_drafter_batch = True


def sample_without_discarded_requests(
    original: Callable[..., Any], runner: CPUModelRunner, *args: Any, **kwargs: Any
) -> Any:
    """Keep a seeded request's generator out of the sampling of a chunk whose token is thrown away."""
    generators: dict[int, torch.Generator] = runner.input_batch.generators
    discarded = {row: generators.pop(row) for row in list(generators) if runner.discard_request_mask.np[row]}
    before = SAMPLING.set(True)  # for the hooks on what samples, which see tensors alone
    try:
        return original(runner, *args, **kwargs)
    finally:
        SAMPLING.reset(before)
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
    original: Callable[..., None], manager: LoRAModelManager, *args: Any, **kwargs: Any
) -> None:
    """Of this manager's model alone."""
    original(manager, *args, **kwargs)
    punica: Any  # a CPU's
    for punica in manager.punica_wrapper_mapping.values():
        punica._shrink_prefill = partial(_shrink, punica._shrink_prefill, punica)


def _shrink(
    shrink: Callable[..., None], punica: PunicaWrapperCPU, shrunk: torch.Tensor, *args: Any, **kwargs: Any
) -> None:
    """shrunk: [T, rank], which is multiplied by B next, and added to the layer's output without adapters."""
    shrink(shrunk, *args, **kwargs)
    shrunk.masked_fill_((punica.token_lora_indices < 0).unsqueeze(1), 0.0)


def time_events() -> None:
    from vllm.v1.worker.cpu.shm import _EventPlaceholder

    _EventPlaceholder.elapsed_time = elapsed_time  # type: ignore[attr-defined]  # which it lacks


def what_times_events() -> str:
    from vllm.v1.worker.cpu.shm import _EventPlaceholder

    return str(getattr(getattr(_EventPlaceholder, "elapsed_time", None), "__module__", "none"))


def elapsed_time(_event: Any, _end: Any) -> float:
    """In milliseconds, which nobody has measured: a `torch.Event` is a stand-in on a CPU."""
    return math.nan


def prepare_with_lengths_of_its_own(
    original: Callable[..., Any], proposer: EagleProposer, *args: Any, **kwargs: Any
) -> Any:
    metadata, token_indices = original(proposer, *args, **kwargs)
    metadata.seq_lens = metadata.seq_lens.clone()
    return metadata, token_indices
