"""Wrappers that concern single requests: which are refused before they run, and how many slots one may need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler


def refuse_tokens_outside_the_vocabulary(
    original: Callable[..., None], scheduler: Scheduler, request: Req, *args: Any, **kwargs: Any
) -> None:
    """As SGLang refuses a prompt that is too long: the request ends with a status of 400 before it runs."""
    size, tokens = scheduler.model_config.vocab_size, request.origin_input_ids
    wrong = [token for token in (min(tokens), max(tokens)) if not 0 <= token < size] if tokens else []
    if wrong and request.to_finish is None:
        request.set_finish_with_abort(f"Token id {wrong[0]} is out of vocabulary, wanted one of 0 to {size - 1}")
    original(scheduler, request, *args, **kwargs)


def count_what_is_reserved(original: Callable[..., int], *args: Any, **kwargs: Any) -> int:
    """As many columns for a request's slots as a step with drafts reserves."""
    from sglang.srt.mem_cache import allocation_sizing

    return max(original(*args, **kwargs), allocation_sizing.get_alloc_reserve_per_decode())
