"""Numbers of data files: each with its unit, how it is known, its source and its date."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KINDS = ("spec", "measured", "computed", "assumed")
"""How a number is known: stated by a maker or in a public file, measured, computed from others, or assumed."""
FIELDS = frozenset({"value", "unit", "kind", "source", "date"})
PRICE_MONTHS = 12
"""After so many a price is called old."""


@dataclass(frozen=True)
class Figure:
    name: str
    """With the unit in it, as memory_tb_per_s."""
    value: float
    unit: str
    kind: str
    """One of `KINDS`."""
    source: str
    date: datetime.date
    """Of the source, or the day on which it was read where it has none."""
    is_unverified: bool = False
    """No source that can be checked says so; it is marked wherever it is shown."""

    @property
    def mark(self) -> str:
        """The kind, as it is shown."""
        return f"{self.kind}, unverified" if self.is_unverified else self.kind

    def months(self, today: datetime.date) -> int:
        """Its age in whole months."""
        difference = 12 * (today.year - self.date.year) + today.month - self.date.month
        return difference - (today.day < self.date.day)


def figure_of(name: str, raw: Mapping[str, Any]) -> Figure:
    """From JSON.

    Raises:
        ValueError: if a field is missing, left over or of another form, with the figure's name.
    """
    wrong = FIELDS ^ (raw.keys() - {"unverified"})
    if wrong:
        raise ValueError(f"{name}: {', '.join(sorted(wrong))} missing or not known; wanted {', '.join(sorted(FIELDS))}")
    if isinstance(raw["value"], bool) or not isinstance(raw["value"], (int, float)):
        raise ValueError(f"{name}: value {raw['value']!r}, wanted a number")
    if raw["kind"] not in KINDS:
        raise ValueError(f"{name}: kind {raw['kind']!r}, wanted one of {', '.join(KINDS)}")
    if not raw["source"]:
        raise ValueError(f"{name}: no source")
    when = datetime.date.fromisoformat(raw["date"])
    return Figure(name, raw["value"], raw["unit"], raw["kind"], raw["source"], when, raw.get("unverified", False))


def figures_of(raw: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
    return {name: figure_of(name, figure) for name, figure in raw.items()}
