"""Whether an output begins within reasoning, told by its prompt; and reasoning told by token ids."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from longcat_core.chat.tags import CALL_OPEN, END, THINK_CLOSE, THINK_OPEN

THINK_ON = "/think_on"
_TURNS = ("<longcat_assistant>", "ASSISTANT:")
_TAIL = 32
"""Tokens at the end of a prompt that hold `/think_on` and the beginning of the turn."""


class Phase(Enum):
    """Where an output begins."""

    ANSWER = "without reasoning, unless the model opens it by itself"
    THINK = "the prompt asks for reasoning; the model opens it"
    OPENED = "the prompt ends with the tag that opens reasoning"
    INSIDE = "the prompt goes on behind the tag that opens reasoning"

    @property
    def is_open(self) -> bool:
        return self in (Phase.OPENED, Phase.INSIDE)


def phase_of(prompt: str) -> Phase:
    """The phase after a rendered prompt, or after the end of one that holds the whole last turn."""
    opened = prompt.rfind(THINK_OPEN)
    turn = max(map(prompt.rfind, _TURNS))
    if opened > max(prompt.rfind(THINK_CLOSE), prompt.rfind(END), turn):
        return Phase.OPENED if prompt.endswith(THINK_OPEN) else Phase.INSIDE
    if turn >= 0 and prompt[:turn].rstrip().endswith(THINK_ON) and prompt.rfind(THINK_CLOSE) < turn:
        return Phase.THINK
    return Phase.ANSWER


@dataclass(frozen=True)
class ThinkTokens:
    """The ids of the tags around reasoning, for what engines ask of token ids: a mask of a grammar, a count."""

    opening: int
    closing: int
    call: int | None
    """Of `<longcat_tool_call>`, which ends reasoning as well."""
    turns: frozenset[int]
    """Of what is not within a turn of the assistant: nothing before it matters."""

    @classmethod
    def of(cls, vocabulary: Mapping[str, int]) -> ThinkTokens | None:
        """None if a tag around reasoning is not one token: then only the text tells."""
        opening, closing = vocabulary.get(THINK_OPEN), vocabulary.get(THINK_CLOSE)
        if opening is None or closing is None:
            return None
        names = (END, "<longcat_user>", "<longcat_assistant>", "<longcat_observation>", "<longcat_system>")
        turns = frozenset(vocabulary[name] for name in names if name in vocabulary)
        return cls(opening, closing, vocabulary.get(CALL_OPEN), turns)

    def phase(self, prompt: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Phase:
        """The phase after a prompt's ids; `decode` gives the text of some of them."""
        for place in range(len(prompt) - 1, -1, -1):
            token = prompt[place]
            if token == self.opening:
                return Phase.OPENED if place == len(prompt) - 1 else Phase.INSIDE
            if token == self.closing:
                return Phase.ANSWER
            if token in self.turns:
                break
        return phase_of(decode(prompt[-_TAIL:]))

    def end(self, output: Sequence[int]) -> int | None:
        """The place of the first token that ends reasoning in ids of an output that begins within it.

        A call's tag counts, though `Reasoning` waits for what follows it.
        """
        for place, token in enumerate(output):
            if token == self.closing or token == self.call:
                return place
        return None

    def count(self, output: Sequence[int], phase: Phase) -> int:
        """How many tokens of an output are reasoning, without the tags."""
        count, inside = 0, phase.is_open
        for token in output:
            if token == self.opening:
                inside = True
            elif token == self.closing or token == self.call:
                inside = False
            else:
                count += inside
        return count
