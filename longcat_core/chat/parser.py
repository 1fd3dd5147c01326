"""The parser of LongCat's output: text in pieces, cut anywhere, becomes reasoning, content and calls of tools."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable

from longcat_core.chat.body import SPACE, Body, Step
from longcat_core.chat.events import Event, Message, Output, gather
from longcat_core.chat.json_form import JsonCall
from longcat_core.chat.prompt import Phase
from longcat_core.chat.reasoning import Reasoning
from longcat_core.chat.tags import CALL_CLOSE, CALL_OPEN, END, THINK_CLOSE, THINK_OPEN, Reader, Tags
from longcat_core.chat.tools import Tool
from longcat_core.chat.xml_form import XmlCall

_CALL_TAGS, _THINK_TAGS = (CALL_OPEN, CALL_CLOSE), (THINK_OPEN, THINK_CLOSE)
_TAGS = {
    (calls, reasoning): Tags(*(_CALL_TAGS if calls else ()), *(_THINK_TAGS if reasoning else ()), END)
    for calls in (True, False)
    for reasoning in (True, False)
}
"""By what is read: calls, reasoning. The other tags are text."""


class ChatParser:
    """One output of a LongCat model.

    Both forms of calls are read, whichever comes; the tools give XML values their types, and calls of other names are
    calls as well. What a call's tag begins and what is no call comes back as content, from the tag on if no name was
    given, otherwise from where it stopped being one. Text of nothing but spaces beside a tag is layout and is left out,
    as is one line's end behind a call and on each side of reasoning's tags; all other text is given to the letter.
    """

    def __init__(self, tools: Iterable[Tool] | None = (), phase: Phase | None = Phase.ANSWER) -> None:
        """
        tools: None: no call is read, and its tags are text.
        phase: where the output begins, by its prompt (`prompt.phase_of`). None: no reasoning is read, and its tags are
            text.
        """
        self._tools = {tool.name: tool for tool in tools or ()}
        self._tags = _TAGS[tools is not None, phase is not None]
        self._reader = Reader()
        self._output = Output()
        self._reasoning = Reasoning(phase) if phase is not None and phase.is_open else None
        self._head: list[str] | None = None  # a call's tag and the spaces around it, which are text if it is no call
        self._body: Body | None = None
        self._blank: list[str] = []  # spaces, before anything else has come behind a tag
        self._is_blank = True
        self._had_tag = self._reasoning is not None
        self._skips_line_end = False
        self._owes_tag = False  # whether a call was given up before its end tag

    @property
    def in_reasoning(self) -> bool:
        return self._reasoning is not None

    def feed(self, text: str) -> list[Event]:
        """More of the output: what is known by it. The events of all pieces together do not depend on the cuts."""
        self._reader.add(text)
        return self._read()

    def finish(self) -> list[Event]:
        """The output is over: the events of what was still held. Feed nothing more."""
        self._reader.final = True
        return self._read()

    def _read(self) -> list[Event]:
        while self._advance():
            pass
        return self._output.take()

    def _advance(self) -> bool:
        """Read on in what is being read; whether something else begins."""
        if self._reasoning is not None:
            if not self._reasoning.read(self._reader, self._output.reasoning):
                return False
            self._reasoning = None
            self._end_block()
            return True
        if self._body is not None:
            return self._read_body(self._body)
        if self._head is not None:
            return self._read_head(self._head)
        return self._read_text()

    def _read_text(self) -> bool:
        reader = self._reader
        text, tag = reader.until(self._tags)
        if text:
            self._say(text)
        if not tag:
            if reader.final and not self._had_tag:
                self._output.content("".join(self._blank))
            return False
        if tag == CALL_CLOSE and not self._owes_tag:
            self._say(tag)
            return True
        if tag == THINK_OPEN:
            self._reasoning = Reasoning(Phase.OPENED)
        elif tag == CALL_OPEN:
            self._head = [*self._blank, tag]
        self._owes_tag &= tag not in (CALL_CLOSE, CALL_OPEN)
        self._end_block()
        return True

    def _read_head(self, head: list[str]) -> bool:
        """Read on behind a call's tag: the first character that is no space tells the form."""
        reader = self._reader
        head.append(reader.spaces(SPACE))
        if reader.empty and not reader.final:
            return False
        self._body = JsonCall(self._tools) if reader.text.startswith("{", reader.at) else XmlCall(self._tools)
        return True

    def _read_body(self, body: Body) -> bool:
        step = body.read(self._reader, self._output)
        if step is Step.MORE:
            return False
        head, self._head, self._body = self._head or [], None, None
        self._end_block()
        if step is Step.NO_CALL:
            self._skips_line_end = False
            self._say("".join(head) + body.rest)
        elif step is Step.ENDED_WITHOUT_TAG:
            self._owes_tag = True
            if body.rest:
                self._skips_line_end = False
                self._say(body.rest)
        return True

    def _end_block(self) -> None:
        """A tag has come: spaces before it are layout, and so are those behind it if nothing else follows."""
        self._blank.clear()
        self._is_blank = self._had_tag = self._skips_line_end = True

    def _say(self, text: str) -> None:
        """Content."""
        if self._skips_line_end:
            self._skips_line_end = False
            text = text.removeprefix("\n")
        if self._is_blank:
            if not text or text.isspace():
                self._blank.append(text)
                return
            self._is_blank = False
            text = "".join(self._blank) + text
            self._blank.clear()
        self._output.content(text)


def parse(text: str, tools: Iterable[Tool] | None = (), phase: Phase | None = Phase.ANSWER) -> Message:
    """A whole output at once."""
    parser = ChatParser(tools, phase)
    return gather([*parser.feed(text), *parser.finish()])
