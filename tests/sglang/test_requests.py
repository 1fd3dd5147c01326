"""A token outside the vocabulary is refused in whatever process a request is taken, before it runs."""

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


def queued(tokens: list[int], finish: Any = None) -> list[str]:
    """With what a request of these tokens is ended when SGLang's scheduler queues it, which it is in any case."""
    messages: list[str] = []
    queue: list[Any] = []
    request = SimpleNamespace(
        origin_input_ids=array("q", tokens), to_finish=finish, set_finish_with_abort=messages.append
    )
    scheduler = SimpleNamespace(model_config=SimpleNamespace(vocab_size=VOCABULARY))
    requests.refuse_tokens_outside_the_vocabulary(
        lambda _scheduler, request, is_retracted: queue.append((request, is_retracted)), scheduler, request, True
    )
    assert queue == [(request, True)]
    return messages


@pytest.mark.parametrize("wrong", [-1, VOCABULARY, 2**40])
def test_a_token_outside_the_vocabulary_ends_its_request_alone(wrong: int) -> None:
    assert queued([5, wrong, 7]) == [f"Token id {wrong} is out of vocabulary, wanted one of 0 to {VOCABULARY - 1}"]


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
