"""Reasoning between `<longcat_think>` tags, of which the first may be in the prompt, and the rest of an output."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from collections.abc import Callable

from longcat_core.chat.prompt import Phase
from longcat_core.chat.tags import CALL_OPEN, END, THINK_CLOSE, THINK_OPEN, Reader, Tags

_SPACE = re.compile(r"\s*")
_OPEN = Tags(THINK_OPEN)
_ENDS = Tags(THINK_CLOSE, CALL_OPEN, END)
_BEGINS_A_CALL = frozenset("\n{_")


class Reasoning:
    """Reads one block of reasoning, to its end: the tag, or a call, before which a model may forget the tag.

    A call's tag ends it only if what a call begins with follows: a line's end, a bracket or a letter. Models also write
    about the tag. One line's end at each side of the block is of the format, and is left out.
    """

    def __init__(self, phase: Phase) -> None:
        self._is_new = True  # nothing has come
        self._skips_line_end = phase is not Phase.INSIDE
        self._line_end = ""  # which is not given, if the end tag follows

    def read(self, reader: Reader, say: Callable[[str], None]) -> bool:
        """Read on, and give what was read; whether the block is over. A call's tag stays unread."""
        while self._is_new:
            tag = reader.here(_OPEN)
            if tag is None:
                return False
            if tag:  # in the prompt and again in the output
                reader.at += len(tag)
                self._skips_line_end = True
            else:
                self._is_new = False
                if self._skips_line_end and reader.text.startswith("\n", reader.at):
                    reader.at += 1
        while True:
            text, tag = reader.until(_ENDS)
            self._say(text, say)
            if tag == THINK_CLOSE:
                return True
            if tag == CALL_OPEN:
                if reader.empty and not reader.final:
                    reader.at -= len(tag)
                    return False
                following = reader.text[reader.at : reader.at + 1]
                if following in _BEGINS_A_CALL or following.isalpha():
                    reader.at -= len(tag)
                    return True
                self._say(tag, say)
            elif not tag:
                if reader.final:
                    say(self._line_end)
                return False

    def _say(self, text: str, say: Callable[[str], None]) -> None:
        if not text:
            return
        text = self._line_end + text
        self._line_end = "\n" if text.endswith("\n") else ""
        say(text[: len(text) - len(self._line_end)])


class ReasoningSplitter:
    """The first block of reasoning of an output, and all the rest as it is: for engines that parse an output in two
    passes, of which the second is `ChatParser` on the rest. Cuts make no difference.

    The line's end behind reasoning is left out, and so is a rest of nothing but spaces.
    """

    def __init__(self, phase: Phase = Phase.ANSWER) -> None:
        self.ended = False
        """Whether there is no reasoning, or it is over: all that comes is rest."""
        self._reader = Reader()
        self._block = Reasoning(phase) if phase.is_open else None
        self._spaces: list[str] = []  # before reasoning or before the rest, if nothing else came
        self._skips_line_end = False
        self._is_blank = False  # whether only spaces have come behind reasoning

    def feed(self, text: str) -> tuple[str, str]:
        """More of the output: the reasoning and the rest that are known by it."""
        self._reader.add(text)
        return self._read()

    def finish(self) -> tuple[str, str]:
        """The output is over: what was still held, as it might have been the beginning of a tag."""
        self._reader.final = True
        return self._read()

    def _read(self) -> tuple[str, str]:
        reader = self._reader
        reasoning: list[str] = []
        if self._block is None and not self.ended:
            self._begin()
        if self._block is not None and self._block.read(reader, reasoning.append):
            self._block = None
            self.ended = self._skips_line_end = self._is_blank = True
        return "".join(reasoning), self._rest() if self.ended else ""

    def _begin(self) -> None:
        """Whether reasoning begins: only spaces may come before its tag."""
        reader = self._reader
        self._spaces.append(reader.spaces(_SPACE))
        tag = reader.here(_OPEN)
        if tag:
            reader.at += len(tag)
            self._spaces.clear()
            self._block = Reasoning(Phase.OPENED)
        elif tag is not None:
            self.ended = True
            self._is_blank = False

    def _rest(self) -> str:
        reader = self._reader
        text = reader.text[reader.at :]
        reader.at = len(reader.text)
        if self._skips_line_end and text:
            self._skips_line_end = False
            text = text.removeprefix("\n")
        if self._is_blank:
            if not text or text.isspace():
                self._spaces.append(text)
                return ""
            self._is_blank = False
        if self._spaces:
            text = "".join(self._spaces) + text
            self._spaces.clear()
        return text
