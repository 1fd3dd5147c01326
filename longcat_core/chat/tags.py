"""LongCat's tags, and text that comes in pieces, in which a tag may be cut."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re

THINK_OPEN = "<longcat_think>"
THINK_CLOSE = "</longcat_think>"
CALL_OPEN = "<longcat_tool_call>"
CALL_CLOSE = "</longcat_tool_call>"
KEY_OPEN = "<longcat_arg_key>"
KEY_CLOSE = "</longcat_arg_key>"
VALUE_OPEN = "<longcat_arg_value>"
VALUE_CLOSE = "</longcat_arg_value>"
END = "</longcat_s>"
"""The end of a turn. Engines keep it out of the text that they give a parser, raw trajectories have it."""

_CUT_TAG = ("<longcat_", "</longcat_")


class Tags:
    """Tags to look for. Each begins with `<` and has no other one, so at most one is cut at the end of a text."""

    def __init__(self, *tags: str) -> None:
        self.pattern = re.compile("|".join(map(re.escape, tags)))
        self.beginnings = frozenset(tag[:length] for tag in tags for length in range(1, len(tag)))
        self.longest = max(map(len, tags))


class Reader:
    """The text that has come and is not read yet.

    What is left unread between two deltas is the beginning of a tag at most, so a delta costs what it is long.
    """

    __slots__ = ("at", "final", "text")

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        """Where reading goes on in `text`."""
        self.final = False
        """Whether `text` is the last that comes."""

    def add(self, delta: str) -> None:
        self.text = self.text[self.at :] + delta
        self.at = 0

    @property
    def empty(self) -> bool:
        return self.at >= len(self.text)

    def until(self, tags: Tags) -> tuple[str, str]:
        """Read up to the first tag, and the tag: what comes before it, and the tag, which is empty if none has come.

        The beginning of a tag at the end of the text is left unread. At the end of the output it is what any text is,
        unless it is LongCat's beyond doubt: then the output was cut within a tag, and it is left out.
        """
        text, at = self.text, self.at
        if text.find("<", at) < 0:  # the most frequent case, and the fastest answer
            self.at = len(text)
            return text[at:], ""
        found = tags.pattern.search(text, at)
        if found is not None:
            self.at = found.end()
            return text[at : found.start()], found.group()
        cut = text.rfind("<", max(at, len(text) - tags.longest))
        if cut >= 0 and text[cut:] in tags.beginnings:
            if not self.final:
                self.at = cut
                return text[at:cut], ""
            if text.startswith(_CUT_TAG, cut):
                self.at = len(text)
                return text[at:cut], ""
        self.at = len(text)
        return text[at:], ""

    def here(self, tags: Tags) -> str | None:
        """The tag that comes next, which stays unread; empty if there is none here; None if that cannot be said yet."""
        found = tags.pattern.match(self.text, self.at)
        if found is not None:
            return found.group()
        if self.final:
            return ""
        if len(self.text) - self.at < tags.longest and self.text[self.at :] in tags.beginnings:
            return None
        return None if self.empty else ""

    def spaces(self, pattern: re.Pattern[str]) -> str:
        """Read what `pattern`, which matches the empty text as well, matches here."""
        found = pattern.match(self.text, self.at)
        assert found is not None
        self.at = found.end()
        return found.group()
