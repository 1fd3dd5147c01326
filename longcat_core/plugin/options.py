"""What becomes of an engine's own options where LongCat is served: rows that the docs' tables are made from."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    """What happens where an option is given."""

    SERVED = "served"
    WITH_EXCEPTIONS = "served, with exceptions: refused before any worker starts, or left to the engine's own class"
    """Of some values, or in some deployments; `Option.why` says which."""
    REFUSED = "refused, with the reason, before any worker starts"
    """In every deployment."""
    OWN_CLASS = "left to the engine's own class, with one warning"
    UNTRIED = "not tried"


@dataclass(frozen=True)
class Option:
    """One option of an engine, or one value of it, that was looked at."""

    flag: str
    """As it is typed on the command line, with its value where the row is about that value alone."""
    outcome: Outcome
    why: str
    """What it does with LongCat; of what is refused, what would go wrong."""
    known_by: str
    """How that is known: run on a CPU, or read in the engine's source."""

    @property
    def name(self) -> str:
        """The option without a value."""
        return self.flag.split()[0]


def markdown_table(options: Iterable[Option]) -> str:
    """A table of one row an option, in their order, that ends with a line break."""
    lines = ["| option | with LongCat | why | how it is known |", "|---|---|---|---|"]
    for option in options:
        cells = (f"`{option.flag}`", option.outcome.value, option.why, option.known_by)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
