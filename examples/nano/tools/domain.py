"""The four tools of the tool-calling Nano, each spelling in which clients declare them, and what they give."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

ADD, MULTIPLY, LIST, READ = NAMES = ("add", "multiply", "list_files", "read_file")

NO_DIRECTORY, NO_FILE = "no such directory", "no such file"
ERROR = "Error: "
"""How the result of a tool that failed begins."""


class _Parameter(NamedTuple):
    name: str
    type: str
    description: str


class _Signature(NamedTuple):
    descriptions: tuple[str, ...]
    """The first is the one of `tools`; training draws from all."""
    parameters: tuple[_Parameter, ...]


_NUMBERS = (_Parameter("a", "integer", "The first number."), _Parameter("b", "integer", "The second number."))
_SIGNATURES = {
    ADD: _Signature(("Add two integers.", "Adds a and b.", "The sum of two numbers."), _NUMBERS),
    MULTIPLY: _Signature(("Multiply two integers.", "Multiplies a and b.", "The product of two numbers."), _NUMBERS),
    LIST: _Signature(
        ("List the files of a directory.", "The names of the files in a directory.", "Lists a directory."),
        (_Parameter("directory", "string", "The directory to list."),),
    ),
    READ: _Signature(
        ("Read a text file.", "The text of a file.", "Reads a file, which may not exist."),
        (_Parameter("path", "string", "The file to read."),),
    ),
}


def _plain(name: str, parameters: tuple[_Parameter, ...]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {each.name: {"type": each.type} for each in parameters},
        "required": [each.name for each in parameters],
    }


def _described(name: str, parameters: tuple[_Parameter, ...]) -> dict[str, Any]:
    properties = {each.name: {"type": each.type, "description": each.description} for each in parameters}
    return _plain(name, parameters) | {"properties": properties}


def _sorted(name: str, parameters: tuple[_Parameter, ...]) -> dict[str, Any]:
    return dict(sorted(_plain(name, parameters).items()))


def _titled(name: str, parameters: tuple[_Parameter, ...]) -> dict[str, Any]:
    return {
        "properties": {each.name: {"title": each.name.capitalize(), "type": each.type} for each in parameters},
        "required": [each.name for each in parameters],
        "title": f"{name}_args",
        "type": "object",
        "additionalProperties": False,
    }


_STYLES: tuple[Callable[[str, tuple[_Parameter, ...]], dict[str, Any]], ...] = (_plain, _described, _sorted, _titled)
"""Schemas as people write them, with descriptions, and as LangChain and pydantic make them of a function."""


def tools() -> list[dict[str, Any]]:
    """All four, as `/v1/chat/completions` takes them."""
    return [_declared(name, _SIGNATURES[name].descriptions[0], _plain) for name in NAMES]


def drawn_tools(draw: random.Random) -> list[dict[str, Any]]:
    """Some of the four, mostly all, in any order and any spelling."""
    names = draw.sample(NAMES, len(NAMES) if draw.random() < 0.7 else draw.randint(2, 3))
    style = draw.choice(_STYLES)
    return [_declared(name, draw.choice(_SIGNATURES[name].descriptions), style) for name in names]


def _declared(
    name: str, description: str, style: Callable[[str, tuple[_Parameter, ...]], dict[str, Any]]
) -> dict[str, Any]:
    parameters = style(name, _SIGNATURES[name].parameters)
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


class Call(NamedTuple):
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Files:
    """What there is to list and to read, by directory and name."""

    directories: Mapping[str, Mapping[str, str]]

    def result(self, call: Call) -> str:
        """What a tool gives: a text, which begins with `ERROR` if it failed.

        Raises:
            ValueError: if there is no such tool, or if it does not take these arguments.
        """
        match call:
            case (name, {"a": int(a), "b": int(b), **rest}) if name in (ADD, MULTIPLY) and not rest:
                return str(a + b if name == ADD else a * b)
            case (name, {"directory": str(directory), **rest}) if name == LIST and not rest:
                files = self.directories.get(directory)
                return ERROR + NO_DIRECTORY if files is None else "\n".join(files)
            case (name, {"path": str(path), **rest}) if name == READ and not rest:
                directory, _, file = path.rpartition("/")
                return self.directories.get(directory, {}).get(file, ERROR + NO_FILE)
        raise ValueError(f"{call.name}({call.arguments}): no tool of {', '.join(NAMES)} takes this")
