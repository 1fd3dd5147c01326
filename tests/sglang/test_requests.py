"""What is outside the vocabulary is refused in whatever process a request is taken, before it runs."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import inspect
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from longcat_core.plugin.hooks import Wrapper
from longcat_sglang import requests
from longcat_sglang.hooks import HOOKS

VOCABULARY = 320


def queued(tokens: list[int], finish: Any = None, top: int = 0, stops: list[int] | None = None) -> list[str]:
    """With what a request of these tokens is ended when SGLang's scheduler queues it, which it is in any case."""
    messages: list[str] = []
    queue: list[Any] = []
    request = SimpleNamespace(
        origin_input_ids=array("q", tokens),
        to_finish=finish,
        set_finish_with_abort=messages.append,
        logprob=SimpleNamespace(top_logprobs_num=top),
        sampling_params=SimpleNamespace(stop_token_ids=stops),
    )
    scheduler = SimpleNamespace(model_config=SimpleNamespace(vocab_size=VOCABULARY))
    requests.refuse_what_is_outside_the_vocabulary(
        lambda _scheduler, request, is_retracted: queue.append((request, is_retracted)), scheduler, request, True
    )
    assert queue == [(request, True)]
    return messages


@pytest.mark.parametrize("wrong", [-1, VOCABULARY, 2**40])
def test_a_token_outside_the_vocabulary_ends_its_request_alone(wrong: int) -> None:
    assert queued([5, wrong, 7]) == [f"Token id {wrong} is out of vocabulary, wanted one of 0 to {VOCABULARY - 1}"]


@pytest.mark.parametrize("wrong", [-1, VOCABULARY, 10**6])
def test_a_stop_token_outside_the_vocabulary_ends_its_request_alone(wrong: int) -> None:
    """Else it ends the server, with `min_tokens`, which indexes logits with it."""
    (message,) = queued([5], stops=[3, wrong])
    assert message.startswith(f"stop_token_ids: Token id {wrong} is out of vocabulary")


def test_more_logprobs_than_tokens_end_their_request_alone() -> None:
    assert queued([5], top=VOCABULARY + 1) == ["top_logprobs: 321 is more than the 320 tokens of the vocabulary"]
    assert queued([5], top=VOCABULARY, stops=[0, VOCABULARY - 1]) == []


@pytest.mark.parametrize("tokens", [[5, VOCABULARY], [-1], [5], [], None])
def test_a_prompt_is_looked_at_before_a_stream_begins(tokens: list[int] | None) -> None:
    manager: Any = SimpleNamespace(model_config=SimpleNamespace(vocab_size=VOCABULARY))
    seen: list[Any] = []

    def original(manager: Any, request: Any, input_ids: Any) -> None:
        seen.append(input_ids)

    if tokens in ([5], [], None):
        requests.refuse_a_prompt_outside_the_vocabulary(original, manager, "request", tokens)
        assert seen == [tokens]
    else:
        with pytest.raises(ValueError, match="is out of vocabulary, wanted one of 0 to 319"):
            requests.refuse_a_prompt_outside_the_vocabulary(original, manager, "request", tokens)


def test_other_requests_are_queued_as_they_are() -> None:
    assert queued([0, VOCABULARY - 1]) == []
    assert queued([]) == []
    assert queued([VOCABULARY], finish="ended already") == []


def test_every_request_still_passes_where_tokens_are_checked() -> None:
    """The scheduler takes requests of each kind, from every process that sends it some, in these methods."""
    from sglang.srt.managers.scheduler import Scheduler

    (hook,) = (hook for hook in HOOKS if hook.name == "prompt check")
    assert isinstance(hook, Wrapper)
    path = f"self.{hook.target.rpartition('.')[2]}(req)"
    for handler, single in [
        (Scheduler.handle_generate_request, path),
        (Scheduler.handle_embedding_request, path),
        (Scheduler.handle_batch_generate_request, "self.handle_generate_request("),
        (Scheduler.handle_batch_embedding_request, "self.handle_embedding_request("),
    ]:
        assert single in inspect.getsource(inspect.unwrap(handler)), handler.__name__


def test_sglangs_scheduler_still_does_not_look_for_tokens_outside_the_vocabulary() -> None:
    """If this fails, the hook "prompt check" may have become unnecessary."""
    from sglang.srt.managers import scheduler, utils

    assert "out of vocabulary" not in inspect.getsource(scheduler)
    assert "vocab" not in inspect.getsource(utils.validate_input_length)
