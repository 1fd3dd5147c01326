"""Outputs of a LongCat model, drawn at random: what was meant, and how either form of calls writes it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from random import Random
from typing import Any

from longcat_core.chat.prompt import Phase
from longcat_core.chat.tags import (
    CALL_CLOSE,
    CALL_OPEN,
    END,
    KEY_CLOSE,
    KEY_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    VALUE_CLOSE,
    VALUE_OPEN,
)
from longcat_core.chat.templates import Form
from longcat_core.chat.tools import Tool

_UNIT = {"type": "string", "enum": ["celsius", "fahrenheit"]}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "$defs": {"Unit": _UNIT, "Node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}}},
    "properties": {
        "text": {"type": "string"},
        "code": {"anyOf": [{"type": "string"}, {"enum": ["a"]}]},
        "unit": {"$ref": "#/$defs/Unit"},
        "count": {"type": "integer"},
        "share": {"type": "number"},
        "flag": {"type": "boolean"},
        "rows": {"type": "array", "items": {"type": "object"}},
        "node": {"$ref": "#/$defs/Node"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "either": {"type": ["integer", "string"]},
    },
}
TOOLS = (
    Tool("get_weather", SCHEMA),
    Tool("run.code-2", {"allOf": [SCHEMA, {"properties": {"naïve key": {"type": "string"}}}]}),
    Tool("naïve", None),
)

_WORDS = (
    *(
        "the",
        "weather",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "101",
        "-1.5",
        "true",
        "null",
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        "\\n",
        ",",
    ),
    *("é", "龙猫", "🐈", "\u2028", "\x7f", "<", "</", "<b>", "<longcat", "<longcat_", "&lt;", "'", ":", "functions."),
    *("    def f(x):\n        return {x!r}\n", "```\n", "/think_on", '{"name": "f"}', "</tool_call>", "\r\n", "\u00a0"),
)
_ARGUMENT_TAGS = (KEY_OPEN, KEY_CLOSE, VALUE_OPEN, VALUE_CLOSE)
_CLOSERS = "|".join((VALUE_CLOSE, KEY_CLOSE, VALUE_OPEN))
AMBIGUOUS = re.compile(
    rf"(?:{_CLOSERS})\s*(?:{KEY_OPEN}|{CALL_CLOSE}|{CALL_OPEN}|{END}|$)|{CALL_CLOSE}\s*(?:{CALL_OPEN}|{END}|$)"
    rf"|{KEY_OPEN}\s*[\w ï]+\s*(?:{KEY_CLOSE}|{VALUE_OPEN})"
)
"""In a value of the XML form, which has no escape: what may as well be the end of the value."""
CUT_TAG = re.compile(r"</?longcat_[a-z_]*$")


@dataclass(frozen=True)
class Conversation:
    output: str
    phase: Phase
    reasoning: str
    content: str
    calls: tuple[tuple[str, dict[str, Any]], ...]


def text(random: Random, tags: tuple[str, ...] = (), most: int = 12) -> str:
    words = _WORDS + tags
    return "".join(random.choice(words) for _ in range(random.randrange(most)))


def draw(random: Random, form: Form) -> Conversation:
    """Reasoning or none, its tag in the prompt or the output; content before, between and after up to three calls."""
    phase = random.choice(list(Phase))
    reasoning = ""
    output = ""
    if phase.is_open or random.random() < 0.5:
        tags = (*_ARGUMENT_TAGS, CALL_CLOSE, f"{CALL_OPEN} ", f"`{CALL_OPEN}`")
        reasoning = text(random, tags)
        while reasoning.startswith(THINK_OPEN) or CUT_TAG.search(reasoning):
            reasoning = text(random, tags)
        opening = {Phase.OPENED: "\n", Phase.INSIDE: ""}.get(phase, f"{THINK_OPEN}\n")
        output = f"{opening}{reasoning}\n{THINK_CLOSE}\n"
    segments = [_content(random) if random.random() < 0.7 else ""]
    calls = []
    output += segments[0]
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        tool = random.choice(TOOLS)
        arguments = _arguments(random, tool)
        calls.append((tool.name, arguments))
        output += _JSON(random, tool, arguments) if form is Form.JSON else xml_call(tool, arguments)
        segment = _content(random) if random.random() < 0.3 else ""
        segments.append(segment)
        output += ("\n" if form is Form.XML or segment.startswith("\n") else "") + segment
    if random.random() < 0.3:
        output += END
    return Conversation(output, phase, reasoning, "".join(segments), tuple(calls))


def xml_call(tool: Tool, arguments: dict[str, Any]) -> str:
    pairs = "".join(
        f"{KEY_OPEN}{key}{KEY_CLOSE}\n{VALUE_OPEN}{_raw(value)}{VALUE_CLOSE}\n" for key, value in arguments.items()
    )
    return f"{CALL_OPEN}{tool.name}\n{pairs}{CALL_CLOSE}"


def _JSON(random: Random, tool: Tool, arguments: dict[str, Any]) -> str:  # noqa: N802
    written = json.dumps(
        {"name": tool.name, "arguments": arguments},
        ensure_ascii=random.random() < 0.5,
        indent=random.choice((None, None, None, 2)),
    )
    return f"{CALL_OPEN}\n{written}\n{CALL_CLOSE}"


def _raw(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _content(random: Random) -> str:
    """Text that is content beyond doubt: not only spaces, and no tag of LongCat's that opens something."""
    while True:
        said = text(random, (*_ARGUMENT_TAGS, CALL_CLOSE))
        if said.strip() and not CUT_TAG.search(said):
            return said


def _arguments(random: Random, tool: Tool) -> dict[str, Any]:
    names = list(SCHEMA["properties"]) + (["naïve key"] if tool.name == "run.code-2" else [])
    if tool.parameters is None:  # without a schema, what looks like a number is one
        return {f"k{i}": random.choice((1, None, [1], {"a": "b"}, "word", True)) for i in range(random.randrange(4))}
    drawn: dict[str, Any] = {}
    for name in random.sample(names, random.randrange(len(names))):
        drawn[name] = _value(random, name)
        while AMBIGUOUS.search(_raw(drawn[name])):
            drawn[name] = _value(random, name)
    return drawn


def _value(random: Random, name: str) -> Any:
    if name in ("text", "code", "naïve key", "maybe", "either"):
        value = _string(random)
        if name == "maybe":
            return None if random.random() < 0.3 or value.strip() == "null" else value
        if name == "either":
            return random.randrange(-99, 99) if random.random() < 0.5 or looks_like_number(value) else value
        return value
    if name == "unit":
        return random.choice(_UNIT["enum"])
    if name == "count":
        return random.choice((0, -1, 10**30, random.randrange(10**6)))
    if name == "share":
        return random.choice((0.5, -1e-9, 1e300, 3))
    if name == "flag":
        return random.random() < 0.5
    return [_object(random, 2) for _ in range(random.randrange(3))] if name == "rows" else _object(random, 3)


def looks_like_number(value: str) -> bool:
    return re.fullmatch(r"-?[0-9].*", value.strip(), re.DOTALL) is not None


def _string(random: Random) -> str:
    if random.random() < 0.0005:
        return text(random, most=40_000)  # huge
    tags = (*_ARGUMENT_TAGS, CALL_OPEN, CALL_CLOSE, THINK_OPEN, THINK_CLOSE, END)
    return text(random, tags, most=60 if random.random() < 0.02 else 8)


def _object(random: Random, depth: int) -> dict[str, Any]:
    values = ("", text(random, (CALL_CLOSE, VALUE_CLOSE)), 1, -2.5, None, True, [], {}, [1, [2, {"a": ""}]])
    drawn = {text(random): random.choice(values) for _ in range(random.randrange(3))}
    if depth and random.random() < 0.4:
        drawn["next"] = _object(random, depth - 1)
    return drawn
