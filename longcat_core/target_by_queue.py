"""The target of a dial between two bounds: the greater while nothing waits, and less as the queue grows."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence

Target = float | Sequence[float]
"""Of a dial, in FFN experts a token: a number that it holds, or two bounds."""

PLACES = 8
"""Steps of the same size from the one bound to the other."""
PATIENCE = 8
"""Forward passes in a row that have to ask for the next place: the dial needs some to follow, and to turn is not for
nothing."""


class TargetByQueue:
    """Moves by one place at a time. It is asked for the next one where the queue has come as far as that, so that a
    queue around a border between two does not move it to and fro.

    It depends on nothing but what it is given: ranks that are given the same have the same target.
    """

    def __init__(self, bounds: tuple[float, float]) -> None:
        """bounds: FFN experts a token, in any order."""
        self._lesser, self._greater = sorted(bounds)
        self._place = 0
        """0 of the greater bound, `PLACES` of the lesser."""
        self._asked = 0
        """Forward passes in a row that ask for the next place: below 0 for the one towards the greater bound."""

    @property
    def bounds(self) -> tuple[float, float]:
        """The lesser, the greater."""
        return self._lesser, self._greater

    @property
    def target(self) -> float:
        """FFN experts a token, exactly a bound at either end."""
        if self._place == PLACES:
            return self._lesser
        return self._greater - (self._greater - self._lesser) * self._place / PLACES

    def next(self, waiting: int, full_queue: int) -> float:
        """The target of the next forward pass, for which this is called once.

        waiting: requests that do; full_queue: so many, or more, make the lesser bound the target.
        """
        wanted = PLACES * min(1.0, waiting / full_queue)
        if wanted >= self._place + 1:
            self._asked = max(0, self._asked) + 1
        elif wanted <= self._place - 1:
            self._asked = min(0, self._asked) - 1
        else:
            self._asked = 0
        if abs(self._asked) == PATIENCE:
            self._place += self._asked // PATIENCE
            self._asked = 0
        return self.target
