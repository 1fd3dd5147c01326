"""What `longcat doctor` reports: one finding a line, made by each engine package for its own engine."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from longcat_core import checkpoint
from longcat_core.engine import Engine


class Finding(NamedTuple):
    subject: str
    value: str
    problem: str = ""
    """Empty if all is well; else what is wanted and what to do."""


def version_of(engine: Engine) -> Finding:
    problem = "" if engine.is_supported() else f"wanted {engine.supported_text}; install such a {engine.name}"
    return Finding(engine.name, str(engine.version()), problem)


def checkpoint_finding(directory: Path) -> Finding:
    try:
        config = checkpoint.read_config(directory)
        checkpoint.verify(directory, config)
    except ValueError as error:
        return Finding("checkpoint", str(directory), str(error))
    return Finding("checkpoint", f"{directory}: {config.total_parameters / 1e6:,.0f} M parameters, complete")
