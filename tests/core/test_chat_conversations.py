"""The parser on outputs drawn at random: what was written comes back, and cuts make no difference."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from random import Random

import pytest

from longcat_core.chat.events import ArgumentsDelta, CallEnd, CallStart, ContentDelta, Event, Message, gather
from longcat_core.chat.parser import ChatParser, parse
from longcat_core.chat.prompt import Phase
from longcat_core.chat.reasoning import ReasoningSplitter
from longcat_core.chat.tags import (
    CALL_CLOSE,
    CALL_OPEN,
    END,
    KEY_CLOSE,
    KEY_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    VALUE_CLOSE,
    VALUE_OPEN,
)
from longcat_core.chat.templates import Form
from tests.conversations import TOOLS, Conversation, draw, text

CASES = 5_000
"""Of each form; each of the other tests has some thousand more."""
TAGS = (THINK_OPEN, THINK_CLOSE, CALL_OPEN, CALL_CLOSE, KEY_OPEN, KEY_CLOSE, VALUE_OPEN, VALUE_CLOSE, END)


def cut(random: Random, output: str, longest: int) -> list[str]:
    pieces, at = [], 0
    while at < len(output):
        pieces.append(output[at : (at := at + random.randint(1, longest))])
    return pieces


def streamed(pieces: Iterable[str], phase: Phase) -> list[Event]:
    parser = ChatParser(TOOLS, phase)
    return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()


def in_two_passes(pieces: Iterable[str], phase: Phase) -> Message:
    splitter, parser = ReasoningSplitter(phase), ChatParser(TOOLS)
    parts = [splitter.feed(piece) for piece in pieces] + [splitter.finish()]
    events = [event for _, rest in parts for event in parser.feed(rest)] + parser.finish()
    rest = gather(events)
    return Message("".join(reasoning for reasoning, _ in parts) + rest.reasoning, rest.content, rest.calls)


def is_meant(case: Conversation, message: Message) -> bool:
    calls = tuple((call.name, json.loads(call.arguments)) for call in message.calls)
    return (message.reasoning, message.content, calls) == (case.reasoning, case.content, case.calls) and all(
        call.complete for call in message.calls
    )


@pytest.mark.parametrize("form", Form)
def test_what_was_written_comes_back_however_it_is_cut(form: Form) -> None:
    for seed in range(CASES):
        random = Random(seed)
        case = draw(random, form)
        whole = parse(case.output, TOOLS, case.phase)
        assert is_meant(case, whole), f"{seed=}\n{case}\n{whole}"
        longest = 1 if seed % 10 == 0 else 12  # 1: cut at every place at once
        assert gather(streamed(cut(random, case.output, longest), case.phase)) == whole, f"{seed=}\n{case}"
        if seed % 5 == 1:
            assert in_two_passes(cut(random, case.output, longest), case.phase) == whole, f"{seed=}\n{case}"


@pytest.mark.parametrize("form", Form)
def test_one_cut_at_any_place_makes_no_difference(form: Form) -> None:
    cases = [draw(Random(seed), form) for seed in range(-40, 0)]
    for case in cases:
        if len(case.output) < 700:
            whole = parse(case.output, TOOLS, case.phase)
            for at in range(1, len(case.output)):
                assert gather(streamed((case.output[:at], case.output[at:]), case.phase)) == whole, f"{at=}\n{case}"


def test_events_come_in_order_and_none_is_empty() -> None:
    for seed in range(1_000):
        random = Random(seed)
        case = draw(random, random.choice(list(Form)))
        open_call = None
        begun = 0
        for event in streamed(cut(random, case.output, 6), case.phase):
            match event:
                case CallStart(index, name):
                    assert (index, open_call) == (begun, None), f"{seed=}"
                    assert name
                    open_call, begun = index, begun + 1
                case CallEnd(index, _):
                    assert index == open_call, f"{seed=}"
                    open_call = None
                case ArgumentsDelta(index, delta):
                    assert index == open_call, f"{seed=}"
                    assert delta
                case _:
                    assert event.text
        assert open_call is None


def test_arguments_and_content_come_as_they_are_written() -> None:
    """Nothing is held longer than a tag may last: what has come is known, but for a tag's length and a few spaces."""
    value = "word " * 200
    for form in (
        f'{CALL_OPEN}\n{{"name": "get_weather", "arguments": {{"text": "',
        f"{CALL_OPEN}get_weather\n{KEY_OPEN}text{KEY_CLOSE}\n{VALUE_OPEN}",
        "",
        f"{THINK_OPEN}\n",
    ):
        parser = ChatParser(TOOLS)
        parser.feed(form)
        given = 0
        for character in value:
            given += sum(len(getattr(event, "text", "")) for event in parser.feed(character))
        assert given >= len(value) - 1, form


def test_a_name_is_given_before_any_argument_comes() -> None:
    for opening in (f'{CALL_OPEN}\n{{"name": "get_weather"', f"{CALL_OPEN}get_weather\n"):
        assert CallStart(0, "get_weather") in ChatParser(TOOLS).feed(opening)


def test_anything_at_all_is_read_without_an_error_and_cuts_make_no_difference() -> None:
    parts = (
        *TAGS,
        "get_weather",
        "functions.naïve",
        '{"name": "get_weather", "arguments": {',
        '"text": "',
        "}}",
        "\n",
        " ",
    )
    parts += ("text", "count", "rows", "[1, ", "12", "null", "\\u00", "(", ")", "prose", '"name"', ":")
    for seed in range(3_000):
        random = Random(seed)
        output = "".join(random.choice(parts) if random.random() < 0.9 else text(random) for _ in range(20))
        phase = random.choice(list(Phase))
        whole = parse(output, TOOLS, phase)
        assert gather(streamed(cut(random, output, 1 + seed % 9), phase)) == whole, f"{seed=} {output!r}"
        for call in whole.calls:
            if call.complete:
                assert isinstance(json.loads(call.arguments), dict), f"{seed=} {output!r}\n{whole}"


def test_json_that_is_bad_comes_back_as_text_and_no_word_is_lost_or_invented() -> None:
    for seed in range(3_000):
        random = Random(seed)
        words = [f"w{seed}x{i}" for i in range(5)]
        good = json.dumps({"name": "get_weather", "arguments": {"text": words[1], "rows": [{words[2]: words[3]}, 1]}})
        at = random.randrange(len(good))
        bad = (
            good[:at] + random.choice(('"', "}", "", "{", "\\", "x", ",", ":", "\n")) + good[at + random.randrange(2) :]
        )
        output = f"{words[0]}{CALL_OPEN}\n{bad}\n{CALL_CLOSE}{words[4]}"
        message = gather(streamed(cut(random, output, 5), Phase.ANSWER))
        assert message == parse(output, TOOLS)
        shown = message.content + "".join(call.name + call.arguments for call in message.calls)
        for word in words:
            if word in output and not re_keyed(bad):
                assert word in shown, f"{seed=} {output!r}\n{message}"
        for call in message.calls:
            assert not call.complete or isinstance(json.loads(call.arguments), dict), f"{seed=} {output!r}"
        assert len(shown) <= len(output), "nothing is invented"


def re_keyed(bad: str) -> bool:
    """Whether the object has other keys than a call's, which a call has no place for."""
    return '"arguments"' not in bad or '}, "rows"' in bad


def test_a_stream_says_no_part_of_a_tag() -> None:
    """At no time has anything been given that the whole output does not say."""
    for seed in range(300):
        random = Random(seed)
        case = draw(random, random.choice(list(Form)))
        parser, content = ChatParser(TOOLS, case.phase), ""
        for piece in cut(random, case.output, 3):
            content += "".join(event.text for event in parser.feed(piece) if isinstance(event, ContentDelta))
            assert case.content.startswith(content), f"{seed=}\n{case}"


def test_a_token_of_a_long_call_costs_what_one_of_a_short_call_costs() -> None:
    def seconds(size: int, form: Form) -> float:
        value = "word " * (size // 5)
        call = {Form.JSON: json.dumps({"name": "get_weather", "arguments": {"text": value}})}
        output = CALL_OPEN + call.get(form, f"get_weather\n{KEY_OPEN}text{KEY_CLOSE}\n{VALUE_OPEN}{value}") + CALL_CLOSE
        pieces = [output[at : at + 4] for at in range(0, len(output), 4)]
        started = time.process_time()
        assert all(call.complete for call in gather(streamed(pieces, Phase.ANSWER)).calls)
        return (time.process_time() - started) / len(pieces)

    for form in Form:
        short, long = (min(seconds(size, form) for _ in range(3)) for size in (4_000, 200_000))
        assert long < 4 * short, f"{form}: {short * 1e6:.1f} and {long * 1e6:.1f} us a token"
