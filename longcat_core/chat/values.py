"""One value of LongCat's XML form, written as JSON while it comes: typed by the schema, or by what it looks like."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from json.encoder import encode_basestring

from longcat_core.chat.json_text import JsonText
from longcat_core.chat.schema import Types

_ANYTHING = re.compile(r".*", re.DOTALL)
_NUMBER_PART = re.compile(r"[-+.0-9eE\s]*")
_WORDS = {"true": ("boolean", "true"), "false": ("boolean", "false"), "null": ("null", "null")}
_PYTHON_WORDS = {"True": _WORDS["true"], "False": _WORDS["false"], "None": _WORDS["null"]}
_LONGEST_WORD = 5


def quoted(text: str) -> str:
    """Text as it stands within a JSON string. Pieces can be quoted one by one."""
    return encode_basestring(text)[1:-1]


class Value:
    """Gives a value's JSON as soon as it is known what it is.

    A string comes as it is, to the last space, where the schema allows nothing else. Where it allows more, or says
    nothing, a value is what it looks like, and a string if it looks like nothing that is allowed. A value that looks
    like nothing of what the schema wants is given as the string that the model wrote.
    """

    def __init__(self, types: Types) -> None:
        self.broken: str | None = None
        """What was read from where it stopped being JSON, if that came after some of it was given."""
        self._types = types
        self._held: list[str] = []  # what has come while it is open what the value is
        self._json: JsonText | None = None
        self._valid: list[str] = []  # JSON that is not given yet
        self._is_string = types == {"string"}
        self._given = False  # whether some of the value was given
        self._shape: re.Pattern[str] | None = None  # what a value that is held must go on to look like

    def add(self, text: str) -> str:
        """More of the value; the JSON that is known by it."""
        if self.broken is not None:
            self.broken += text
            return ""
        if self._is_string:
            return self._string(text)
        if self._json is not None:
            return self._read_json(text)
        self._held.append(text)
        if self._shape is None:
            return "" if not text or text.isspace() else self._look()
        if self._shape.fullmatch(text) is None:
            return self._decide_for_string()
        return ""

    def end(self) -> str:
        """The rest of its JSON. `broken` is set if JSON that was given is not complete."""
        if self.broken is not None:
            return ""
        if self._json is not None and self._given:
            valid: list[str] = []
            self._json.finish(valid)
            if not self._json.done:
                self.broken = self._json.unread
            return "".join(valid)
        if self._is_string:
            return self._string("") + '"'
        text = "".join(self._held)
        return _as_json(text.strip(), self._types) or f'"{quoted(text)}"'

    def _look(self) -> str:
        """Decide by the first character that is no space how to go on."""
        text = "".join(self._held)
        first = text.lstrip()[0]
        can_be_string = "string" in self._types
        if first in "{[" and ("object" if first == "{" else "array") in self._types:
            if not can_be_string:
                self._held.clear()
                self._json = JsonText()
                return self._read_json(text)
            self._shape = _ANYTHING  # a string can begin so, and only its end tells
        elif not can_be_string:
            self._shape = _ANYTHING
        elif first in "-0123456789" and "number" in self._types:
            self._shape = _NUMBER_PART
        elif first in "tfnTFN" and self._types & {"boolean", "null"} and len(text.strip()) <= _LONGEST_WORD:
            return ""
        else:
            return self._decide_for_string()
        return "" if self._shape.fullmatch(text) else self._decide_for_string()

    def _decide_for_string(self) -> str:
        self._is_string = True
        text = "".join(self._held)
        self._held.clear()
        return self._string(text)

    def _string(self, text: str) -> str:
        opening = "" if self._given else '"'
        self._given = True
        return opening + quoted(text)

    def _read_json(self, text: str) -> str:
        """An array or an object where no string may be. Brackets alone are held, as prose can begin with one."""
        assert self._json is not None
        at = self._json.read(text, 0, self._valid)
        if not self._json.settled:
            self._held.append(text)
            if self._json.broken:
                self._json = None
                self._shape = _ANYTHING
            return ""
        if self._json.broken or not (text[at:].isspace() or at == len(text)):
            self.broken = self._json.unread + text[at:]
        self._given = True
        given = "".join(self._valid)
        self._valid.clear()
        return given


def _as_json(text: str, types: Types) -> str:
    """A value as JSON, if it is of one of the types and no string; otherwise the empty text.

    Words as Python writes them, in which models are fluent, count where no string can be meant.
    """
    kind, word = _WORDS.get(text) or ("string" not in types and _PYTHON_WORDS.get(text)) or ("", "")
    if kind in types:
        return word
    if not text or text[0] not in "{[-0123456789":
        return ""
    kind = {"{": "object", "[": "array"}.get(text[0], "number")
    if kind not in types:
        return ""
    value, valid = JsonText(), list[str]()
    at = value.read(text, 0, valid)
    value.finish(valid)
    return "".join(valid) if value.done and at == len(text) else ""
