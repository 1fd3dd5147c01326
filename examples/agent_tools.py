"""The tools of the example agents: a calculator, a lister of files, and a reader that fails where there is no file."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

ROOT = Path.cwd().resolve()
"""What is not below it is not there."""


def add(a: int, b: int) -> str:
    """Add two integers."""
    return str(a + b)


def multiply(a: int, b: int) -> str:
    """Multiply two integers."""
    return str(a * b)


def list_files(directory: str) -> str:
    """List the files of a directory."""
    found = (ROOT / directory).resolve()
    if not found.is_relative_to(ROOT) or not found.is_dir():
        return "Error: no such directory"
    return "\n".join(sorted(each.name for each in found.iterdir()))


def read_file(path: str) -> str:
    """Read a text file."""
    found = (ROOT / path).resolve()
    if not found.is_relative_to(ROOT) or not found.is_file():
        return "Error: no such file"
    return found.read_text(errors="replace")


FUNCTIONS = (add, multiply, list_files, read_file)
"""A failure is a result too: the model reads it, and says or tries something else."""


_TYPES = {int: "integer", str: "string"}


def _declared(function: Callable[..., str]) -> dict[str, Any]:
    types = {name: {"type": _TYPES[kind]} for name, kind in get_type_hints(function).items() if name != "return"}
    schema = {"type": "object", "properties": types, "required": list(types)}
    return {
        "type": "function",
        "function": {"name": function.__name__, "description": function.__doc__, "parameters": schema},
    }


DECLARED: list[Any] = [_declared(function) for function in FUNCTIONS]
"""As OpenAI's API takes them."""
