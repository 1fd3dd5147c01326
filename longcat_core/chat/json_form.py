"""A call in the form of LongCat-Flash-Chat and Thinking: a JSON object with name and arguments."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from enum import Enum, auto

from longcat_core.chat.body import SPACE, Body, Step, Tools, close
from longcat_core.chat.events import Output
from longcat_core.chat.json_text import JsonText
from longcat_core.chat.tags import CALL_CLOSE, CALL_OPEN, END, Reader, Tags
from longcat_core.chat.tools import resolve

_ARGUMENTS = ("arguments", "parameters")
_ENDS = Tags(CALL_CLOSE, CALL_OPEN, END)


class _At(Enum):
    OBJECT = auto()
    KEY_OR_END = auto()
    IN_KEY = auto()
    COLON = auto()
    VALUE = auto()
    IN_VALUE = auto()
    COMMA_OR_END = auto()
    CLOSING = auto()


_MARKS = {
    (_At.OBJECT, "{"): _At.KEY_OR_END,
    (_At.COLON, ":"): _At.VALUE,
    (_At.COMMA_OR_END, ","): _At.KEY_OR_END,
    (_At.COMMA_OR_END, "}"): _At.CLOSING,
    (_At.KEY_OR_END, "}"): _At.CLOSING,
}
"""Where a character leads."""


class JsonCall(Body):
    """Reads `{"name": ..., "arguments": {...}}`, with the keys in any order, others beside them, and the end tag.

    Arguments are given as the model wrote them, as soon as the name is known. They may be `null`, empty or left out,
    which makes them `{}`, or a text that holds the object.
    """

    def __init__(self, tools: Tools) -> None:
        super().__init__()
        self._tools = tools
        self._at = _At.OBJECT
        self._json = JsonText()  # of the key or the value that is read
        self._parts: list[str] = []  # what was read of it
        self._key = ""
        self._arguments: str | None = None  # that came before the name
        self._streams = False  # whether the value that is read is given as it comes

    def _read(self, reader: Reader, output: Output) -> Step:
        while True:
            if self._at is _At.CLOSING:
                return close(reader)
            if self._at in (_At.IN_KEY, _At.IN_VALUE):
                self._read_json(reader, output)
                if self._json.broken:
                    self.rest = self._json.unread
                    return Step.ENDED_WITHOUT_TAG
                if self._at in (_At.IN_KEY, _At.IN_VALUE):
                    return Step.ENDED_WITHOUT_TAG if reader.final else Step.MORE
                continue
            reader.spaces(SPACE)
            if reader.empty:
                return Step.ENDED_WITHOUT_TAG if reader.final else Step.MORE
            if not self._mark(reader, output):
                waits = self._at is _At.COMMA_OR_END and reader.here(_ENDS) is None
                return Step.MORE if waits else Step.ENDED_WITHOUT_TAG

    def _mark(self, reader: Reader, output: Output) -> bool:
        """Take the next character, which begins or ends something; whether it may come here."""
        character = reader.text[reader.at]
        if self._at is _At.VALUE:
            self._at = _At.IN_VALUE
            self._streams = character == "{" and self._started and not self._complete and self._key in _ARGUMENTS
        elif self._at is _At.KEY_OR_END and character == '"':
            self._at = _At.IN_KEY
        elif self._at is _At.COMMA_OR_END and character == "<" and reader.here(_ENDS):
            self._at = _At.CLOSING  # the last bracket is missing
        elif (led := _MARKS.get((self._at, character))) is not None:
            self._at = led
            reader.at += 1
        else:
            return False
        if self._at is _At.CLOSING and self._started:
            self._give("{}", output)
        return True

    def _read_json(self, reader: Reader, output: Output) -> None:
        """Read on in a key or a value, and take it if it comes to its end."""
        reader.at = self._json.read(reader.text, reader.at, self._parts)
        if reader.final:
            self._json.finish(self._parts)
        if self._streams:
            output.arguments("".join(self._parts))
            self._parts.clear()
        if not self._json.done:
            return
        text = "".join(self._parts)
        self._json, self._parts = JsonText(), []
        if self._at is _At.IN_KEY:
            self._key, self._at = json.loads(text), _At.COLON
        else:
            self._at = _At.COMMA_OR_END
            self._take(text, output)

    def _take(self, text: str, output: Output) -> None:
        """A value that is complete: the name, the arguments, or something that a call has no place for."""
        if self._streams:
            self._streams, self._complete = False, True
        elif self._key == "name" and not self._started:
            name = json.loads(text).strip() if text[0] == '"' else ""
            if not name:
                return self._refuse(text)
            self._started = True
            output.start(resolve(name, self._tools))
            self._give(self._arguments, output)
        elif self._key in _ARGUMENTS and not self._complete and self._arguments is None:
            self._arguments = _as_object(text)
            if self._arguments is None:
                return self._refuse(text)
            if self._started:
                self._give(self._arguments, output)
        return None

    def _give(self, arguments: str | None, output: Output) -> None:
        if arguments is not None and not self._complete:
            output.arguments(arguments)
            self._complete = True

    def _refuse(self, text: str) -> None:
        """A value is not what it has to be: it is given back."""
        self._json.broken = True
        self._json.unread = text


def _as_object(text: str) -> str | None:
    """Arguments that are an object, or a text that holds one, or nothing; None if they are none of these.

    Python's `json` is not asked for more than texts, as it has limits on numbers and on depth.
    """
    if text[0] == "{":
        return text
    inner = json.loads(text).strip() if text[0] == '"' else ""
    if text == "null" or (text[0] == '"' and not inner):
        return "{}"
    return inner_object(inner)


def inner_object(text: str) -> str | None:
    """A text that holds a JSON object and nothing else, made valid as `JsonText` does; None if it holds none."""
    value, valid = JsonText(), list[str]()
    whole = text.startswith("{") and value.read(text, 0, valid) == len(text) and value.done
    return "".join(valid) if whole else None
