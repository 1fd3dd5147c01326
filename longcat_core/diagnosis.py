"""What `longcat doctor` reports: one finding a line, made by each engine package for its own engine."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    subject: str
    value: str
    problem: str = ""
    """Empty if all is well; else what is wanted and what to do."""
