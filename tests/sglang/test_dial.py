"""Where SGLang's options leave no mean to be held, and what turns a dial; `engines/test_dial.py` has what it does."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi.responses import StreamingResponse
from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionStreamResponse,
    CompletionResponseStreamChoice,
    CompletionStreamResponse,
)
from sglang.srt.entrypoints.openai.sse_utils import build_sse_content
from sglang.srt.managers.io_struct import SetInternalStateReq, SetInternalStateReqOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.utils.weight_versions import build_endpoint_weight_version_metadata

from longcat_core.dial import DialledRouters
from longcat_core.observation import shared_target
from longcat_core.plugin.hooks import Wrapper, guarded
from longcat_core.target_by_queue import PATIENCE, PLACES
from longcat_sglang import dial
from longcat_sglang.hooks import HOOKS
from tests.cases import DEFAULT
from tests.dialled import CPU


@pytest.mark.parametrize(
    ("given", "obstacle"),
    [
        ({"enable_dp_attention": True}, "--enable-dp-attention is given, and ranks with other tokens would turn their"),
        ({"dp_size": 2}, "--dp-size is given, and ranks with other tokens would turn their"),
        ({"moe_a2a_backend": "deepep"}, "--moe-a2a-backend is given, and ranks with other tokens would turn their"),
        ({"enable_memory_saver": True}, "with --enable-memory-saver its memory comes and goes"),
    ],
)
def test_ranks_with_other_tokens_and_memory_that_comes_and_goes_have_no_dial(
    given: dict[str, Any], obstacle: str
) -> None:
    settings = SimpleNamespace(dp_size=1, enable_dp_attention=False, moe_a2a_backend="none", enable_memory_saver=False)
    assert dial.obstacles(settings, DEFAULT, 2.5) == []
    vars(settings).update(given)
    (found,) = dial.obstacles(settings, DEFAULT, 2.5)
    assert found.startswith(obstacle)


class Scheduler:
    """With a dial at 2.5, or without one."""

    waiting_queue: Sequence[object] = ()
    max_running_requests = 4

    def __init__(self, has_dial: bool = True) -> None:
        self.events: list[str] = []
        router = SimpleNamespace(e_score_correction_bias=torch.zeros(DEFAULT.num_experts))
        dialled = DialledRouters(DEFAULT, 2.5, [router], CPU)
        self.dial = dialled.dial
        model = SimpleNamespace(model=SimpleNamespace(dialled=dialled if has_dial else None))
        self.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(model=model))
        self.device_module = SimpleNamespace(synchronize=lambda: self.events.append("steps are done"))

    def set(self, **state: Any) -> bool:
        return dial.turn_where_asked(self._sglangs_own, self, SetInternalStateReq(server_args=state)).updated

    def run(self, passes: int, is_prebuilt: bool = False) -> list[float]:
        """The target of each forward pass."""

        def run_batch(scheduler: Scheduler, given: object) -> float:
            assert given is batch
            return scheduler.dial.target

        batch: Any = SimpleNamespace(forward_mode=ForwardMode.PREBUILT if is_prebuilt else ForwardMode.DECODE)
        return [dial.follow_queue(run_batch, self, batch) for _ in range(passes)]

    def _sglangs_own(self, _: object, request: SetInternalStateReq) -> SetInternalStateReqOutput:
        self.events.append(f"{request.server_args}")
        return SetInternalStateReqOutput(updated=True)


def test_an_administrator_turns_the_dial_behind_the_steps_before(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler()
    monkeypatch.setattr(scheduler.dial, "reset", lambda: scheduler.events.append("reset"))
    assert scheduler.set(longcat_ffn_experts=3)
    assert scheduler.dial.target == 3
    assert scheduler.events == ["steps are done"]
    assert scheduler.set(longcat_ffn_experts=1.5, longcat_reset_dial=1)
    assert scheduler.dial.target == 1.5
    assert scheduler.events == ["steps are done"] * 2 + ["reset"]


def test_between_two_bounds_the_queue_turns_the_dial_behind_the_steps_before() -> None:
    scheduler, passes = Scheduler(), PLACES * PATIENCE
    scheduler.waiting_queue = ["a request"] * 4
    assert set(scheduler.run(passes)) == {2.5}
    assert scheduler.set(longcat_ffn_experts=3, longcat_least_ffn_experts=1)
    assert (scheduler.dial.target, scheduler.events) == (3, ["steps are done"])
    targets = scheduler.run(passes)
    assert targets == sorted(targets, reverse=True)
    assert targets[-1] == 1
    assert scheduler.events == ["steps are done"] * (1 + PLACES), "once a turn"
    scheduler.waiting_queue = []
    assert scheduler.run(passes)[-1] == 3
    assert scheduler.set(longcat_ffn_experts=2)
    scheduler.waiting_queue = ["a request"] * 4
    assert set(scheduler.run(passes)) == {2}


def test_without_a_dial_a_step_is_sglangs() -> None:
    assert Scheduler(has_dial=False).run(1) == [2.5]


@pytest.mark.parametrize(
    ("has_dial", "state", "complaint"),
    [
        (True, {"longcat_ffn_experts": 4, "longcat_reset_dial": 1}, "a dial at 4, wanted more than 0 and less than 4"),
        (True, {"longcat_ffn_experts": 10**400}, "a dial at inf, wanted more than 0"),
        (True, {"longcat_ffn_experts": 4, "longcat_least_ffn_experts": 1}, "a dial at 4, wanted more than 0"),
        (True, {"longcat_least_ffn_experts": 1}, "longcat_least_ffn_experts without longcat_ffn_experts"),
        (True, {"longcat_ffn_experts": None}, "a dial at None, wanted a number"),
        (True, {"longcat_reset_dial": 0}, "longcat_reset_dial is 0, wanted 1"),
        (True, {"longcat_ffn_experts": 3, "pp_max_micro_batch_size": 8}, "pp_max_micro_batch_size beside the dial"),
        (False, {"longcat_ffn_experts": 3}, "there is no dial; start the server with --json-model-override-args"),
        (False, {"longcat_reset_dial": 1}, "there is no dial"),
    ],
)
def test_what_turns_no_dial_is_said_in_the_log(
    has_dial: bool, state: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []  # an engine that ran in this process before may have turned loggers off
    monkeypatch.setattr(dial.logger, "warning", lambda text, *values: said.append(text % values))
    scheduler = Scheduler(has_dial)
    scheduler.dial.settings.fill_(0.5)
    assert not scheduler.set(**state)
    assert said[0].startswith(f"/set_internal_state: {complaint}")
    assert scheduler.dial.target == 2.5
    assert bool((scheduler.dial.settings == 0.5).all())


def test_sglang_still_refuses_fields_that_it_does_not_know() -> None:
    """If this fails, it may have a way for those of a model, and the hook can go."""
    from sglang.srt.managers.scheduler import Scheduler as SGLangs

    request = SetInternalStateReq(server_args={dial.TARGET: 3})
    original: Any = inspect.unwrap(SGLangs.set_internal_state)
    assert not original(SimpleNamespace(), request).updated


ANSWERS, RESPONSES = (
    guarded(hook.name, hook.around, hook.concerns)
    for name in ("target in answers", "target in responses")
    for hook in HOOKS
    if isinstance(hook, Wrapper) and hook.name == name
)
LONGCATS, ANOTHERS = (
    SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(**fields)))
    for fields in ({"longcat": DEFAULT}, {"num_layers": 2})
)
"""What has the model's configuration in the process that answers requests."""


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    """A rank of a server in this process that was started with a dial, of which nothing is written yet."""
    monkeypatch.setenv(shared_target.FILE, "")  # to be as it was afterwards
    monkeypatch.setattr(shared_target, "_made", None)
    scheduler = Scheduler()
    shared_target.settle(has_dial=True)
    return scheduler


async def _all(items: Any) -> list[Any]:
    return [item async for item in items]


def answered(manager: Any) -> list[dict[str, Any]]:
    """`meta_info` of an answer in two parts."""

    async def original(*given: object) -> AsyncIterator[dict[str, Any]]:
        assert given == (manager, "request")
        for finish_reason in (None, {"type": "length"}):
            yield {"meta_info": {"weight_version": "7", "finish_reason": finish_reason}}

    return [answer["meta_info"] for answer in asyncio.run(_all(ANSWERS(original, manager, "request")))]


def responded(manager: Any, response: Any) -> Any:
    async def original(*given: object) -> Any:
        assert given == (serving, "request")
        return response

    async def respond() -> Any:
        found = await RESPONSES(original, serving, "request")
        return await _all(found.body_iterator) if isinstance(found, StreamingResponse) else found

    serving = SimpleNamespace(tokenizer_manager=manager)
    return asyncio.run(respond())


def test_an_answer_names_the_present_target_when_it_is_finished(dialled: Scheduler) -> None:
    assert "ffn_experts" not in answered(LONGCATS)[1], "no rank has written yet"
    for target in (3, 2.375):
        assert dialled.set(longcat_ffn_experts=target)
        first, last = answered(LONGCATS)
        assert "ffn_experts" not in first
        assert last == {"weight_version": "7", "finish_reason": {"type": "length"}, "ffn_experts": target}


def test_a_response_names_it_in_its_metadata(dialled: Scheduler) -> None:
    assert dialled.set(longcat_ffn_experts=3)
    whole = SimpleNamespace(metadata={"weight_version": "7"})
    assert responded(LONGCATS, whole).metadata == {"weight_version": "7", "ffn_experts": 3}
    without = SimpleNamespace(data=[0.5])
    assert responded(LONGCATS, without) is without


def events_of_a_stream() -> list[str]:
    """Text that looks like an end, two ends as chats and completions have them, and what follows."""
    about: dict[str, Any] = {"chunk_id": "1", "created": 0, "model": "m", "index": 0}
    choice = CompletionResponseStreamChoice(index=0, text="x", finish_reason="length")
    return [
        build_sse_content(**about, content='data: {"finish_reason":"stop"}'),
        build_sse_content(**about, finish_reason="stop"),
        f"data: {CompletionStreamResponse(id='1', model='m', choices=[choice]).model_dump_json()}\n\n",
        "data: [DONE]\n\n",
    ]


def test_a_stream_names_it_in_the_event_that_ends_a_choice(dialled: Scheduler) -> None:
    assert dialled.set(longcat_ffn_experts=2.375)
    events = events_of_a_stream()
    text, chats, completions, done = responded(LONGCATS, StreamingResponse(as_they_come(events)))
    assert [text, done] == [events[0], events[-1]]
    for found, was in zip((chats, completions), events[1:3], strict=True):
        assert found.endswith("}\n\n")
        fields = json.loads(found.removeprefix("data: "))
        assert fields.pop("metadata") == {"ffn_experts": 2.375}
        assert fields == json.loads(was.removeprefix("data: "))


async def as_they_come(events: list[str]) -> AsyncIterator[str]:
    for event in events:
        yield event


def test_a_model_that_the_same_process_serves_later_has_no_target(dialled: Scheduler) -> None:
    """Where it is no LongCat, nobody takes the file away."""
    assert dialled.set(longcat_ffn_experts=3)
    assert shared_target.read() == 3
    assert not any("ffn_experts" in meta_info for meta_info in answered(ANOTHERS))
    assert responded(ANOTHERS, SimpleNamespace(metadata={"weight_version": "7"})).metadata == {"weight_version": "7"}
    events = events_of_a_stream()
    assert responded(ANOTHERS, StreamingResponse(as_they_come(events))) == events
    shared_target.settle(has_dial=False)  # as for a LongCat without one
    assert "ffn_experts" not in answered(LONGCATS)[1]
    assert responded(LONGCATS, StreamingResponse(as_they_come(events))) == events


def test_sglang_still_has_no_field_for_a_model() -> None:
    """If this fails, a model may have a way to add to responses, and the hooks can go."""
    assert build_endpoint_weight_version_metadata({"weight_version": "7", "longcat": 1}) == {"weight_version": "7"}
    assert "metadata" not in {*CompletionStreamResponse.model_fields, *ChatCompletionStreamResponse.model_fields}


def test_sglang_still_tells_a_model_nothing_of_what_waits() -> None:
    """If this fails, the hook on `run_batch` may go."""
    names = {field.name for field in dataclasses.fields(ForwardBatch)}
    assert [name for name in names if "waiting" in name or "queue" in name] == []


def test_other_fields_are_sglangs() -> None:
    scheduler = Scheduler()
    assert scheduler.set(pp_max_micro_batch_size=8)
    assert scheduler.events == ["{'pp_max_micro_batch_size': 8}"]
