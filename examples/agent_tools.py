"""The tools of the example agents: a calculator, a lister of files, and a reader that fails where there is no file."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

from openai.types.chat import ChatCompletionToolParam

ROOT = Path.cwd()
"""What is not below it is not there."""


def add(a: int, b: int) -> str:
    """Add two integers."""
    return str(a + b)


def multiply(a: int, b: int) -> str:
    """Multiply two integers."""
    return str(a * b)


def list_files(directory: str) -> str:
    """List the files of a directory."""
    found = _below_root(directory)
    return "\n".join(sorted(each.name for each in found.iterdir())) if found.is_dir() else "Error: no such directory"


def read_file(path: str) -> str:
    """Read a text file."""
    found = _below_root(path)
    return found.read_text(errors="replace") if found.is_file() else "Error: no such file"


FUNCTIONS = (add, multiply, list_files, read_file)
"""A failure is a result too: the model reads it, and says or tries something else."""


def _below_root(path: str) -> Path:
    found = (ROOT / path).resolve()
    return found if found.is_relative_to(ROOT) else ROOT / "outside"


def _declared(name: str, description: str, **types: str) -> ChatCompletionToolParam:
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in types.items()}}
    function = {"name": name, "description": description, "parameters": schema | {"required": list(types)}}
    return ChatCompletionToolParam(type="function", function=function)  # type: ignore[typeddict-item]


DECLARED = [
    _declared("add", "Add two integers.", a="integer", b="integer"),
    _declared("multiply", "Multiply two integers.", a="integer", b="integer"),
    _declared("list_files", "List the files of a directory.", directory="string"),
    _declared("read_file", "Read a text file.", path="string"),
]
"""As OpenAI's API takes them."""
