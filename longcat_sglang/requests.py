"""Wrappers that concern single requests: a prompt's tokens, what is refused before it runs, slots that one may need."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from longcat_core.chat.templates import choose
from longcat_core.tokenization import leave_open

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

logger = logging.getLogger(__name__)


def tokenize_as_prepared(original: Callable[..., None], manager: TokenizerManager, *args: Any, **kwargs: Any) -> None:
    """Whatever route a prompt takes: each encodes with the manager's tokenizer. A checkpoint without a chat template
    gets LongCat's, by its tokens."""
    original(manager, *args, **kwargs)
    tokenizer = manager.tokenizer
    leave_open(tokenizer)
    if tokenizer is not None and tokenizer.chat_template is None:
        template = choose(tokenizer.get_vocab())
        tokenizer.chat_template = template.text
        logger.info(
            "The checkpoint has no chat template: LongCat's %r is taken, as the tokens are of that format. "
            "--chat-template takes another.",
            template.name,
        )


def refuse_what_is_outside_the_vocabulary(
    original: Callable[..., None], scheduler: Scheduler, request: Req, *args: Any, **kwargs: Any
) -> None:
    """As SGLang refuses a prompt that is too long: the request ends with a status of 400 before it runs. Every request
    passes here, from whatever process."""
    problem = _outside(request, scheduler.model_config.vocab_size)
    if problem and request.to_finish is None:
        request.set_finish_with_abort(problem)
        # What cannot be computed is not asked for either, as an aborted request runs once.
        request.logprob.top_logprobs_num, request.sampling_params.stop_token_ids = 0, None
    original(scheduler, request, *args, **kwargs)


def _outside(request: Req, size: int) -> str:
    """What of a request is outside a vocabulary of this size, or nothing."""
    if wrong := _wrong_token(request.origin_input_ids, size):
        return wrong
    if wrong := _wrong_token(request.sampling_params.stop_token_ids, size):
        return f"stop_token_ids: {wrong}"
    if request.logprob.top_logprobs_num > size:
        return f"top_logprobs: {request.logprob.top_logprobs_num} is more than the {size} tokens of the vocabulary"
    return ""


def _wrong_token(tokens: Collection[int] | None, size: int) -> str:
    wrong = [token for token in (min(tokens), max(tokens)) if not 0 <= token < size] if tokens else []
    return f"Token id {wrong[0]} is out of vocabulary, wanted one of 0 to {size - 1}" if wrong else ""


def refuse_a_prompt_outside_the_vocabulary(
    original: Callable[..., None], manager: TokenizerManager, request: Any, input_ids: Any, *args: Any, **kwargs: Any
) -> None:
    """With a status of 400 for a stream too, whose status is sent before its first answer comes.

    Raises:
        ValueError: as SGLang's own check of a prompt's length.
    """
    if input_ids is not None and (wrong := _wrong_token(input_ids, manager.model_config.vocab_size)):
        raise ValueError(wrong)
    original(manager, request, input_ids, *args, **kwargs)


def count_what_is_reserved(original: Callable[..., int], *args: Any, **kwargs: Any) -> int:
    """As many columns for a request's slots as a step with drafts reserves."""
    from sglang.srt.mem_cache import allocation_sizing

    return max(original(*args, **kwargs), allocation_sizing.get_alloc_reserve_per_decode())
