"""What the two forms of a call have in common: how a call ends, and what becomes of something that is none."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum, auto

from longcat_core.chat.events import Output
from longcat_core.chat.tags import CALL_CLOSE, CALL_OPEN, END, Reader, Tags
from longcat_core.chat.tools import Tool

SPACE = re.compile(r"\s*")
_CLOSING = re.compile(r"[\s})]*")
_AFTER = Tags(CALL_CLOSE, CALL_OPEN, END)


class Step(Enum):
    """How far a call has been read."""

    MORE = auto()
    """All that has come is read, and the call goes on."""
    ENDED = auto()
    """The call is over, and its end tag is read."""
    ENDED_WITHOUT_TAG = auto()
    """The call is over, and something else than its end tag comes: it is text, `rest` first."""
    NO_CALL = auto()
    """What was taken for a call is none: it is text, all of it, which is `rest`."""


class Body(ABC):
    """A call from behind its tag on."""

    def __init__(self) -> None:
        self.rest = ""
        self._started = False  # whether its name was given
        self._complete = False  # whether all arguments were given
        self._raw: list[str] = []  # all that was read, until the call starts

    def read(self, reader: Reader, output: Output) -> Step:
        """Read on, as far as the text has come."""
        begin = reader.at
        step = self._read(reader, output)
        if not self._started:
            self._raw.append(reader.text[begin : reader.at])
            if step is not Step.MORE:
                self.rest = "".join(self._raw)
                return Step.NO_CALL
        elif step is not Step.MORE:
            output.end(self._complete)
        return step

    @abstractmethod
    def _read(self, reader: Reader, output: Output) -> Step: ...


def close(reader: Reader) -> Step:
    """Read on behind a call's arguments, to its end tag. Brackets that close nothing say nothing: models write one too
    many, or one too few. Without an end tag the call is over all the same, before whatever comes."""
    reader.spaces(_CLOSING)
    tag = reader.here(_AFTER)
    if tag is None:
        return Step.MORE
    if tag == CALL_CLOSE:
        reader.at += len(tag)
        return Step.ENDED
    return Step.ENDED_WITHOUT_TAG


Tools = Mapping[str, Tool]
"""By name."""
