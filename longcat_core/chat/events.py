"""What a parser gives: reasoning, content, and calls of tools, piece by piece; and the message that the pieces make."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins, and its function is known. Calls are counted from 0, in the order in which they come."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of a call's arguments. All texts of a complete call together are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """Nothing more comes for a call. It is not `complete` if the output ended within it, or if it stopped being JSON:
    then its arguments are as far as the model wrote them, and not closed for it."""

    index: int
    complete: bool


Event: TypeAlias = ReasoningDelta | ContentDelta | CallStart | ArgumentsDelta | CallEnd


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str
    """JSON: an object, if the call is complete."""
    complete: bool


@dataclass(frozen=True)
class Message:
    reasoning: str
    content: str
    calls: tuple[Call, ...]


def gather(events: Iterable[Event]) -> Message:
    """The message that all events of an output make."""
    reasoning: list[str] = []
    content: list[str] = []
    names: list[str] = []
    arguments: list[list[str]] = []
    complete: list[bool] = []
    for event in events:
        match event:
            case ReasoningDelta(text):
                reasoning.append(text)
            case ContentDelta(text):
                content.append(text)
            case CallStart(_, name):
                names.append(name)
                arguments.append([])
                complete.append(False)
            case ArgumentsDelta(index, text):
                arguments[index].append(text)
            case CallEnd(index, whole):
                complete[index] = whole
    calls = (Call(name, "".join(parts), whole) for name, parts, whole in zip(names, arguments, complete, strict=True))
    return Message("".join(reasoning), "".join(content), tuple(calls))


class Output:
    """Collects the events of one delta; pieces of the same thing become one event."""

    def __init__(self) -> None:
        self.calls = 0
        """Calls begun so far."""
        self._events: list[Event] = []
        self._kind: type[ReasoningDelta | ContentDelta | ArgumentsDelta] | None = None
        self._parts: list[str] = []

    def reasoning(self, text: str) -> None:
        self._add(ReasoningDelta, text)

    def content(self, text: str) -> None:
        self._add(ContentDelta, text)

    def start(self, name: str) -> None:
        self._flush()
        self._events.append(CallStart(self.calls, name))
        self.calls += 1

    def arguments(self, text: str) -> None:
        """More arguments of the call that began last."""
        self._add(ArgumentsDelta, text)

    def end(self, complete: bool) -> None:
        self._flush()
        self._events.append(CallEnd(self.calls - 1, complete))

    def take(self) -> list[Event]:
        self._flush()
        events, self._events = self._events, []
        return events

    def _add(self, kind: type[ReasoningDelta | ContentDelta | ArgumentsDelta], text: str) -> None:
        if not text:
            return
        if kind is not self._kind:
            self._flush()
            self._kind = kind
        self._parts.append(text)

    def _flush(self) -> None:
        if self._kind is None:
            return
        text = "".join(self._parts)
        self._parts.clear()
        kind, self._kind = self._kind, None
        if kind is ArgumentsDelta:
            self._events.append(ArgumentsDelta(self.calls - 1, text))
        elif kind is ContentDelta:
            self._events.append(ContentDelta(text))
        else:
            self._events.append(ReasoningDelta(text))
