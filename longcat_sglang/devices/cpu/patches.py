"""Wrappers of SGLang's functions for a CPU; the row of `hooks.HOOKS` that names a wrapper has the reason."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.speculative.draft_utils import DraftBackendFactory
    from sglang.srt.speculative.eagle_info import EagleVerifyInput
    from torch import Tensor


def our_drafting_backend(original: Callable[..., Any], factory: DraftBackendFactory, *args: Any, **kwargs: Any) -> Any:
    if not _attends_with_ours(factory.draft_model_runner) or factory.speculative_num_steps < 2:
        return original(factory, *args, **kwargs)
    from longcat_sglang.devices.cpu.attention import DraftingBackend

    return DraftingBackend(factory.draft_model_runner, factory.topk, factory.speculative_num_steps)


def no_backend_beside_ours(
    original: Callable[..., Any], factory: DraftBackendFactory, *args: Any, **kwargs: Any
) -> Any:
    """None is what makes SGLang's worker use the drafter's own backend, which is ours already."""
    return None if _attends_with_ours(factory.draft_model_runner) else original(factory, *args, **kwargs)


def _attends_with_ours(runner: ModelRunner) -> bool:
    from longcat_sglang.devices.cpu.attention import LatentAttentionBackend

    return isinstance(runner.attn_backend, LatentAttentionBackend)


def sum_and_take_own_rows(
    original: Callable[..., Any],
    group: GroupCoordinator,
    input_: Tensor,
    output: Tensor | None = None,
    sizes: list[int] | None = None,
) -> Tensor:
    """SGLang's own way where the order of a sum must not depend on the rank: a sum over all ranks, of which each takes
    its rows."""
    return group._deterministic_reduce_scatterv(input_, output, sizes)


def note_choices_while_recording(original: Callable[..., Any], recorder: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang asks whether a graph is captured where nothing is recorded; a CPU captures none."""
    if recorder.recording:
        original(recorder, *args, **kwargs)


def dump_counts(original: Callable[..., Any], counts: Any, *args: Any, **kwargs: Any) -> Any:
    """Before its first dump SGLang empties the allocator's cache; a CPU's has none."""
    counts._first_dump = False
    return original(counts, *args, **kwargs)


def move_experts(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
    """As `dump_counts`, before the first move."""
    updater._first_execution = False
    return original(updater, *args, **kwargs)


def select_drafts_without_a_compiler(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run in plain PyTorch what SGLang compiles."""
    return getattr(original, "_torchdynamo_orig_callable", original)(*args, **kwargs)


def sample_where_requests_do(
    original: Callable[..., Any],
    draft: EagleVerifyInput,
    batch: ScheduleBatch,
    logits_output: LogitsProcessorOutput,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`original` also applies biases and grammars, in place, so that it is called in any case."""
    greedy = original(draft, batch, logits_output, *args, **kwargs)
    if batch.forward_mode.is_idle() or batch.sampling_info.is_all_greedy:
        return greedy
    from longcat_sglang.devices.cpu.verification import verify_sampled

    return verify_sampled(draft, batch, logits_output)
