"""Reasoning told by token ids, and an output split in two passes."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest

from longcat_core.chat.prompt import Phase, ThinkTokens
from longcat_core.chat.reasoning import ReasoningSplitter

WORDS = ("</longcat_s>", "<longcat_think>", "</longcat_think>", "<longcat_tool_call>", "<longcat_assistant>", "\n", "a")
VOCABULARY = {word: token for token, word in enumerate((*WORDS, " /think_on ", "<longcat_user>"))}
TOKENS = ThinkTokens.of(VOCABULARY)


def ids(*words: str) -> list[int]:
    return [VOCABULARY[word] for word in words]


def decode(tokens: object) -> str:
    by_id = list(VOCABULARY)
    return "".join(by_id[token] for token in tokens)  # type: ignore[attr-defined]


def test_tags_that_are_no_tokens_tell_nothing() -> None:
    assert ThinkTokens.of({"<longcat_think>": 1}) is None


@pytest.mark.parametrize(
    ("prompt", "phase"),
    [
        (("<longcat_assistant>", "<longcat_think>"), Phase.OPENED),
        (("<longcat_assistant>", "<longcat_think>", "\n"), Phase.INSIDE),
        (("<longcat_assistant>", "<longcat_think>", "a", "</longcat_think>", "\n"), Phase.ANSWER),
        (("<longcat_think>", "a", "</longcat_s>", "<longcat_user>", "a", "<longcat_assistant>"), Phase.ANSWER),
        (("<longcat_user>", "a", " /think_on ", "<longcat_assistant>"), Phase.THINK),
        ((), Phase.ANSWER),
    ],
)
def test_the_phase_is_told_by_ids(prompt: tuple[str, ...], phase: Phase) -> None:
    assert TOKENS is not None
    assert TOKENS.phase(ids(*prompt), decode) is phase


def test_reasoning_ends_at_its_tag_or_at_a_call() -> None:
    assert TOKENS is not None
    assert TOKENS.end(ids("a", "</longcat_think>", "a")) == 1
    assert TOKENS.end(ids("a", "a", "<longcat_tool_call>")) == 2
    assert TOKENS.end(ids("a", "<longcat_think>")) is None


def test_tokens_of_reasoning_are_counted_without_its_tags() -> None:
    assert TOKENS is not None
    output = ids("a", "a", "</longcat_think>", "\n", "a", "<longcat_think>", "a", "<longcat_tool_call>", "a")
    assert TOKENS.count(output, Phase.OPENED) == 3
    assert TOKENS.count(output, Phase.ANSWER) == 1


@pytest.mark.parametrize(
    ("output", "phase", "wanted"),
    [
        (" \n<longcat_think>\na\n</longcat_think>\nb <longcat_think>", Phase.ANSWER, ("a", "b <longcat_think>")),
        ("a\n</longcat_think>\n\n<longcat_tool_call>f", Phase.INSIDE, ("a", "\n<longcat_tool_call>f")),
        ("a\n<longcat_tool_call>f", Phase.INSIDE, ("a", "<longcat_tool_call>f")),
        ("a\n</longcat_think>\n \n", Phase.INSIDE, ("a", "")),
        (" b </longcat_think>", Phase.ANSWER, ("", " b </longcat_think>")),
        (" <longcat", Phase.ANSWER, ("", " <longcat")),
    ],
)
def test_the_rest_of_an_output_is_as_it_is(output: str, phase: Phase, wanted: tuple[str, str]) -> None:
    for size in (1, 3, len(output)):
        splitter = ReasoningSplitter(phase)
        parts = [splitter.feed(output[at : at + size]) for at in range(0, len(output), size)] + [splitter.finish()]
        assert tuple("".join(side) for side in zip(*parts, strict=True)) == wanted
        assert splitter.ended
