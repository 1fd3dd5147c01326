"""What the two forms of a call have in common: how a call ends, and what becomes of something that is none."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum, auto
from typing import Protocol

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


class Body(Protocol):
    """A call from behind its tag on."""

    rest: str

    def read(self, reader: Reader, output: Output) -> Step: ...


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
