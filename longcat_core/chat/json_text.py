"""One JSON value that comes in pieces: it is checked as it comes, and what is valid is given back at once."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from typing import Final

# Each character is looked at once, by `re`: possessive, as nothing that was matched is ever given back.
_STRING = re.compile(r'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_CUT_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_SCALAR_PART = re.compile(r"[-+.0-9A-Za-z]*")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_CONTROL_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\b": "\\b", "\f": "\\f"}

# Where reading is: in a string, or at what may come next outside of one. Numbers, as this is asked for each character.
_VALUE: Final = 0
_ITEM_OR_END: Final = 1  # after [
_KEY_OR_END: Final = 2  # after {
_KEY: Final = 3
_COLON: Final = 4
_COMMA_OR_END: Final = 5
_IN_KEY: Final = 6
_IN_STRING: Final = 7

_OPENINGS = {'"': _IN_STRING, "{": _KEY_OR_END, "[": _ITEM_OR_END}
_LEADS: Final[tuple[dict[str, int], ...]] = (
    _OPENINGS,
    _OPENINGS,
    {'"': _IN_KEY},
    {'"': _IN_KEY},
    {":": _VALUE},
    {",": _KEY},  # of an array it is _VALUE
)
"""Where a character leads, by where reading is. An end is looked at by itself."""
_MAY_END = {_ITEM_OR_END: "]", _KEY_OR_END: "}", _COMMA_OR_END: "]}"}


class JsonText:
    """Checks one JSON value. Line ends and other control characters in a string, which JSON forbids and models write,
    become escapes; everything else is given back as it is."""

    __slots__ = ("_ends", "_escape", "_place", "_scalar", "broken", "done", "settled", "unread")

    def __init__(self) -> None:
        self.done = False
        """Whether the value is complete: nothing more is read."""
        self.broken = False
        """Whether something came that JSON does not allow: nothing more is read."""
        self.settled = False
        """Whether more than brackets has come, so that it is hardly anything but JSON."""
        self.unread = ""
        """If it broke within a number, a word or an escape: that, which was not given back."""
        self._place: int = _VALUE
        self._ends: list[str] = []  # of the arrays and objects that are open
        self._escape = ""  # the beginning of an escape that is cut
        self._scalar: list[str] = []  # a number or a word, until it ends

    def read(self, text: str, at: int, valid: list[str]) -> int:
        """Read on from `at`, and append what is valid to `valid`; where it stopped: at the end of the value, before
        what breaks it, or at the end of the text."""
        length = len(text)
        begin = at  # of what is valid and not appended
        while at < length and not self.done and not self.broken:
            place = self._place
            if place >= _IN_KEY:
                if self._escape:
                    begin = at = self._read_escape(text, at, valid)
                    continue
                found = _STRING.match(text, at)
                assert found is not None
                at = found.end()
                if at == length:
                    break
                character = text[at]
                if character == '"':
                    at += 1
                    self._place = _COLON if place == _IN_KEY else _COMMA_OR_END
                    self.done = not self._ends
                    continue
                valid.append(text[begin:at])
                if character != "\\":  # a control character
                    valid.append(_CONTROL_ESCAPES.get(character) or f"\\u{ord(character):04x}")
                    at += 1
                elif _CUT_ESCAPE.fullmatch(text, at):
                    self._escape = text[at:]
                    at = length
                else:
                    self.broken = True
                begin = at
                continue
            character = text[at]
            if self._scalar or (place <= _ITEM_OR_END and (character.isalnum() or character == "-")):
                valid.append(text[begin:at])
                begin = at = self._read_scalar(text, at, valid)
            elif character in " \t\n\r":
                at += 1
            elif (led := _LEADS[place].get(character)) is not None:
                at += 1
                if led >= _IN_KEY:
                    self.settled = True
                elif character == "{":
                    self._ends.append("}")
                elif character == "[":
                    self._ends.append("]")
                elif character == "," and self._ends[-1] == "]":
                    led = _VALUE
                self._place = led
            elif self._ends and character == self._ends[-1] and character in _MAY_END.get(place, ""):
                at += 1
                self._ends.pop()
                self._place = _COMMA_OR_END
                self.settled = True
                self.done = not self._ends
            else:
                self.broken = True
        if begin < at:
            valid.append(text[begin:at])
        return at

    def finish(self, valid: list[str]) -> None:
        """Nothing more comes: a number at the end is complete."""
        if self._scalar and not self.broken:
            self._end_scalar(valid)

    def _read_escape(self, text: str, at: int, valid: list[str]) -> int:
        """Read on in an escape that was cut."""
        before = len(self._escape)
        escape = self._escape + text[at : at + 6 - before]
        if (found := _ESCAPE.match(escape)) is not None:
            valid.append(found.group())
            self._escape = ""
            return at + found.end() - before
        if _CUT_ESCAPE.fullmatch(escape):
            self._escape = escape
            return at + len(escape) - before
        self.broken = True
        self.unread = self._escape
        return at

    def _read_scalar(self, text: str, at: int, valid: list[str]) -> int:
        found = _SCALAR_PART.match(text, at)
        assert found is not None
        self._scalar.append(found.group())
        if found.end() < len(text):
            self._end_scalar(valid)
        return found.end()

    def _end_scalar(self, valid: list[str]) -> None:
        scalar = "".join(self._scalar)
        self._scalar.clear()
        if _SCALAR.fullmatch(scalar):
            valid.append(scalar)
            self.settled = True
            self._place = _COMMA_OR_END
            self.done = not self._ends
        else:
            self.broken = True
            self.unread = scalar
