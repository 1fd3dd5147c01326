"""What `longcat doctor` reports: one finding a line, made by each engine package for its own engine."""

from __future__ import annotations

from typing import NamedTuple

from longcat_core.engine import Engine


class Finding(NamedTuple):
    subject: str
    value: str
    problem: str = ""
    """Empty if all is well; else what is wanted and what to do."""


def version_of(engine: Engine) -> Finding:
    problem = "" if engine.is_supported() else f"wanted {engine.supported_text}; install such a {engine.name}"
    return Finding(engine.name, str(engine.version()), problem)
