"""`longcat doctor`: what is installed and hooked here, and what a LongCat model would get."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longcat_core.plugin.diagnosis import Finding

ENGINE_PACKAGES = {"vllm": "longcat_vllm", "sglang": "longcat_sglang"}
"""Engine and our package for it; ours is imported only if the engine is installed."""


def command(
    checkpoint: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="A checkpoint to check as well.")] = None,
) -> None:
    """Say what is installed, what the plugin hooked, and which implementations LongCat-Flash would get here.

    The exit status is 1 where something is wrong; the last column says what to do.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with Console(stderr=True).status("asking the engines"):
        findings = list(diagnose(checkpoint))
    table = Table("", "found", "to do", show_edge=False)
    for finding in findings:
        mark = "[red]✗[/red]" if finding.problem else "[green]✓[/green]"
        table.add_row(f"{mark} {finding.subject}", escape(finding.value), escape(finding.problem))
    Console(width=None if Console().is_terminal else 160).print(table)
    if any(finding.problem for finding in findings):
        raise typer.Exit(1)


def diagnose(checkpoint: Path | None) -> Iterator[Finding]:
    """All findings: the environment's, then each engine's."""
    yield Finding("longcat-serving", importlib.metadata.version("longcat-serving"))
    yield Finding("Python", platform.python_version())
    for package in ("torch", "transformers"):
        yield _installed(package)
    engines = {engine: ours for engine, ours in ENGINE_PACKAGES.items() if importlib.util.find_spec(engine)}
    if not engines:
        yield Finding("engine", "none", f"install one of {', '.join(ENGINE_PACKAGES)} into this environment")
    for ours in engines.values():
        yield from importlib.import_module(f"{ours}.diagnosis").diagnose(checkpoint)


def _installed(package: str) -> Finding:
    try:
        return Finding(package, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return Finding(package, "none", f"pip install {package}")
