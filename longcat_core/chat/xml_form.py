"""A call in the form of LongCat-Flash-Lite, Thinking-2601 and later: the name, then keys and values in tags."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re

from longcat_core.chat.body import SPACE, Body, Step, Tools, close
from longcat_core.chat.events import Output
from longcat_core.chat.json_form import inner_object
from longcat_core.chat.json_text import JsonText
from longcat_core.chat.schema import ANY, argument_names, argument_types
from longcat_core.chat.tags import (
    CALL_CLOSE,
    CALL_OPEN,
    END,
    KEY_CLOSE,
    KEY_OPEN,
    VALUE_CLOSE,
    VALUE_OPEN,
    Reader,
    Tags,
)
from longcat_core.chat.tools import resolve
from longcat_core.chat.values import Value, quoted

_NAME_PART = re.compile(r"[^<\n{(]*")
_NAME = re.compile(r"[^\W\d][\w.:/-]{0,127}")
"""Of a tool that the request does not have: so that prose after the tag is no call."""
_LONGEST_NAME = 256
_BODY = Tags(KEY_OPEN, CALL_CLOSE, CALL_OPEN, END, VALUE_OPEN, KEY_CLOSE, VALUE_CLOSE)
_KEY_ENDS = Tags(KEY_CLOSE, VALUE_OPEN, VALUE_CLOSE, KEY_OPEN, CALL_CLOSE, CALL_OPEN, END)
_VALUE_ENDS = Tags(VALUE_CLOSE, KEY_CLOSE, VALUE_OPEN, CALL_CLOSE, KEY_OPEN)
_AFTER_VALUE = Tags(KEY_OPEN, CALL_CLOSE, CALL_OPEN, END)
_AFTER_CALL = Tags(CALL_OPEN, END)


class XmlCall(Body):
    """Reads the name, `<longcat_arg_key>KEY</longcat_arg_key>`, `<longcat_arg_value>VALUE</longcat_arg_value>` as often
    as they come, and the end tag; and gives the arguments as a JSON object. They may also be one JSON object already,
    behind the name, in brackets or not, or in the place of a key.

    The form has no escape, so a value may hold any tag. Its own end tag ends it if a key, the end of the call, another
    call or the end of the output follows; so does a wrong tag in its place. Without any, the end tag of the call does
    if another call or the end of the output follows, and the tag of a key if the schema has the key.
    """

    def __init__(self, tools: Tools) -> None:
        super().__init__()
        self._tools = tools
        self._state = self._read_name
        self._name = ""
        self._keys: set[str] = set()  # that came
        self._opened = False  # whether the object of the arguments was begun
        self._key: list[str] = []
        self._value = Value(ANY)
        self._line_end = ""  # at the end of what came of a value: not of it, if the value's end tag is missing
        self._candidate: list[str] = []  # a tag that may end a value, and what comes behind it
        self._json = JsonText()

    def _read(self, reader: Reader, output: Output) -> Step:
        step = None
        while step is None:
            step = self._state(reader, output)
        return step

    def _read_name(self, reader: Reader, output: Output) -> Step | None:
        self._name += reader.spaces(_NAME_PART)
        if len(self._name) > _LONGEST_NAME:
            return Step.ENDED_WITHOUT_TAG
        if reader.empty and not reader.final:
            return Step.MORE
        end = "" if reader.empty else reader.text[reader.at]
        if end == "<":
            tag = reader.here(_BODY)
            if not tag:
                return Step.MORE if tag is None else Step.ENDED_WITHOUT_TAG
        self._name = resolve(self._name.strip(), self._tools)
        is_known = self._name in self._tools
        if end and end in "{(":
            reader.at += end == "("
            self._state = self._begin_object
            return None if is_known else Step.ENDED_WITHOUT_TAG
        if is_known:
            self._start(output)
        elif not _NAME.fullmatch(self._name):
            return Step.ENDED_WITHOUT_TAG
        self._state = self._read_between
        return None

    def _read_between(self, reader: Reader, output: Output) -> Step | None:
        """Between keys and values, where a name that no tool has turns out to be one."""
        reader.spaces(SPACE)
        tag = reader.here(_BODY)
        if tag is None:
            return Step.MORE
        if tag in (KEY_OPEN, CALL_CLOSE):
            reader.at += len(tag)
            self._start(output)
            if tag == KEY_OPEN:
                self._state = self._read_key
                return None
            self._finish(output)
            return Step.ENDED
        if not self._started:
            return Step.ENDED_WITHOUT_TAG
        if reader.empty or tag in (CALL_OPEN, END):
            self._finish(output)
            return Step.ENDED_WITHOUT_TAG
        if tag:
            reader.at += len(tag)  # an end of what is over
        elif reader.text[reader.at] == "{" and not self._opened:
            self._state = self._read_object
        else:
            self._state = self._read_stray
        return None

    def _read_stray(self, reader: Reader, output: Output) -> Step | None:
        """Text between keys and values, which is no argument."""
        text, tag = reader.until(_BODY)
        output.content(text)
        if not tag and not reader.final:
            return Step.MORE
        reader.at -= len(tag)
        self._state = self._read_between
        return None

    def _read_key(self, reader: Reader, output: Output) -> Step | None:
        text, tag = reader.until(_KEY_ENDS)
        self._key.append(text)
        if not tag:
            return Step.ENDED_WITHOUT_TAG if reader.final else Step.MORE
        key = "".join(self._key).strip()
        self._key.clear()
        if tag in (KEY_OPEN, CALL_CLOSE, CALL_OPEN, END):
            reader.at -= len(tag)
        if (members := inner_object(key)) is not None and key not in self._names():
            if members := members[1:-1].strip():
                output.arguments(self._separator() + members)
            self._state = self._read_between
            return None
        self._begin_value(key, output)
        self._state = self._read_value if tag == VALUE_OPEN else self._read_behind_key
        return None

    def _read_behind_key(self, reader: Reader, output: Output) -> Step | None:
        reader.spaces(SPACE)
        tag = reader.here(_BODY)
        if tag is None:
            return Step.MORE
        if tag in (VALUE_OPEN, KEY_CLOSE, VALUE_CLOSE):
            reader.at += len(tag)
        elif tag:  # no value
            output.arguments(self._value.end())
            self._state = self._read_between
            return None
        elif reader.empty:
            return Step.ENDED_WITHOUT_TAG
        if tag in (VALUE_OPEN, ""):
            self._state = self._read_value
        return None

    def _read_value(self, reader: Reader, output: Output) -> Step | None:
        text, tag = reader.until(_VALUE_ENDS)
        if not self._add(text, output):
            reader.at -= len(tag)
            return Step.ENDED_WITHOUT_TAG
        if not tag:
            if reader.final:
                output.arguments(self._value.add(self._line_end))
            return Step.ENDED_WITHOUT_TAG if reader.final else Step.MORE
        self._candidate = [tag]
        self._state = self._read_new_key if tag == KEY_OPEN else self._read_behind_value
        return None

    def _read_behind_value(self, reader: Reader, output: Output) -> Step | None:
        """Behind a tag that ends a value, if what follows says so."""
        end = self._candidate[0]
        self._candidate.append(reader.spaces(SPACE))
        tag = reader.here(_AFTER_CALL if end == CALL_CLOSE else _AFTER_VALUE)
        if tag is None:
            return Step.MORE
        if not tag and not reader.empty:
            return self._go_on_with_value(output)
        if end != CALL_CLOSE and not self._add_line_end(output):
            return Step.ENDED_WITHOUT_TAG
        if not self._end_value(output):
            return Step.ENDED_WITHOUT_TAG
        if end == CALL_CLOSE:
            self._finish(output)
            return Step.ENDED
        self._state = self._read_between
        return None

    def _read_new_key(self, reader: Reader, output: Output) -> Step | None:
        """Behind a key's tag in a value: it ends the value, whose own end tag is missing, if the schema has the key."""
        text, tag = reader.until(_KEY_ENDS)
        self._candidate.append(text)
        key = "".join(self._candidate[1:]).strip()
        if not tag and not reader.final and len(key) <= _LONGEST_NAME:
            return Step.MORE
        if tag not in (KEY_CLOSE, VALUE_OPEN) or key not in self._names() - self._keys:
            reader.at -= len(tag)
            return self._go_on_with_value(output)
        if not self._end_value(output):
            return Step.ENDED_WITHOUT_TAG
        self._begin_value(key, output)
        self._state = self._read_value if tag == VALUE_OPEN else self._read_behind_key
        return None

    def _begin_object(self, reader: Reader, output: Output) -> Step | None:
        """Behind a name and a bracket."""
        reader.spaces(SPACE)
        if reader.empty and not reader.final:
            return Step.MORE
        following = "" if reader.empty else reader.text[reader.at]
        if not following or following not in "{)":
            return Step.ENDED_WITHOUT_TAG
        self._start(output)
        if following == ")":
            self._finish(output)
        self._state = self._read_object if following == "{" else self._close
        return None

    def _read_object(self, reader: Reader, output: Output) -> Step | None:
        valid: list[str] = []
        reader.at = self._json.read(reader.text, reader.at, valid)
        output.arguments("".join(valid))
        if self._json.done:
            self._complete = True
            self._state = self._close
            return None
        self.rest = self._json.unread
        return Step.ENDED_WITHOUT_TAG if self._json.broken or reader.final else Step.MORE

    def _close(self, reader: Reader, output: Output) -> Step:
        return close(reader)

    def _start(self, output: Output) -> None:
        if not self._started:
            self._started = True
            output.start(self._name)

    def _finish(self, output: Output) -> None:
        output.arguments("}" if self._opened else "{}")
        self._complete = True

    def _names(self) -> frozenset[str]:
        tool = self._tools.get(self._name)
        return argument_names(tool.parameters) if tool else frozenset()

    def _separator(self) -> str:
        separator = ", " if self._opened else "{"
        self._opened = True
        return separator

    def _begin_value(self, key: str, output: Output) -> None:
        tool = self._tools.get(self._name)
        self._value = Value(argument_types(tool.parameters, key) if tool else ANY)
        self._line_end = ""
        self._keys.add(key)
        output.arguments(f'{self._separator()}"{quoted(key)}": ')

    def _add(self, text: str, output: Output) -> bool:
        """More of a value; whether it is still JSON. A line's end is held: it may be of the form, not of the value."""
        text = self._line_end + text
        self._line_end = "\n" if text.endswith("\n") else ""
        output.arguments(self._value.add(text[: len(text) - len(self._line_end)]))
        return self._is_whole()

    def _add_line_end(self, output: Output) -> bool:
        output.arguments(self._value.add(self._line_end))
        self._line_end = ""
        return self._is_whole()

    def _end_value(self, output: Output) -> bool:
        output.arguments(self._value.end())
        return self._is_whole()

    def _is_whole(self) -> bool:
        """Whether the value is JSON so far; otherwise what is read and not given becomes text."""
        if self._value.broken is None:
            return True
        self.rest = self._value.broken + self._line_end + "".join(self._candidate)
        return False

    def _go_on_with_value(self, output: Output) -> Step | None:
        """What looked like an end is of the value."""
        text = "".join(self._candidate)
        self._candidate.clear()
        self._state = self._read_value
        return None if self._add(text, output) else Step.ENDED_WITHOUT_TAG
