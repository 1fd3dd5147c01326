"""Grammars of LongCat's own calls for guided decoding: structural tags of XGrammar as plain data, for either engine."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from longcat_core.chat.prompt import Phase
from longcat_core.chat.schema import dereference, types_of
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

Format: TypeAlias = dict[str, Any]
"""A node of a structural tag, as XGrammar writes it in JSON."""

_TAGS = [CALL_OPEN, CALL_CLOSE, KEY_OPEN, KEY_CLOSE, VALUE_OPEN, VALUE_CLOSE, THINK_OPEN, THINK_CLOSE, END]
"""What no text of a grammar may hold, so that each of them is read as what it is."""
_ANY_OBJECT = {"type": "object"}
_FORMATS_DEPTH = 8


class Choice(Enum):
    """A request's `tool_choice`, without `none`, which needs no grammar."""

    AUTO = "auto"
    REQUIRED = "required"


@dataclass(frozen=True)
class Request:
    """What a request wants of calls."""

    tools: Sequence[Tool]
    choice: Choice | str = Choice.AUTO
    """A text is the name of the one function to call, once."""
    parallel: bool = True
    """Whether there may be more than one call."""


def structural_tag(request: Request, form: Form, phase: Phase = Phase.ANSWER) -> Format:
    """A structural tag: `xgrammar.StructuralTag.model_validate` takes it, and vLLM and SGLang do as JSON.

    Where a call is required, its arguments fit the schema, and nothing but calls comes. Where it is not, text is free,
    a call is one of a tool of the request, and fits the schema of a tool that is strict.

    phase: other than `ANSWER` only if the engine has the grammar guide reasoning as well, which it lets pass.

    Raises:
        ValueError: if there is no tool, or none of the name that is to be called.
    """
    name = request.choice if isinstance(request.choice, str) else None
    tools = [tool for tool in request.tools if name in (None, tool.name)]
    if not tools:
        names = ", ".join(tool.name for tool in request.tools) or "none"
        raise ValueError(f"tool_choice: {name or 'required'}, wanted a tool of the request: {names}")
    is_auto = request.choice is Choice.AUTO
    calls = [_call(tool, form, fits=not is_auto or tool.strict is True) for tool in tools]
    single = not request.parallel or name is not None
    if is_auto:
        excluded = [tag for tag in _TAGS if tag not in (CALL_OPEN, END)]
        wanted: Format = {
            "type": "triggered_tags",
            "triggers": [CALL_OPEN],
            "tags": calls,
            "stop_after_first": single,
            "excludes": excluded,
        }
    else:
        wanted = _sequence(
            _optional(_text("\n")),
            {
                "type": "tags_with_separator",
                "tags": calls,
                "separator": "\n" if form is Form.XML else "",
                "at_least_one": True,
                "stop_after_first": single,
            },
            *([_optional(_text("\n"))] if form is Form.XML else []),
        )
    return {"type": "structural_tag", "format": _after_reasoning(wanted, phase)}


def _after_reasoning(wanted: Format, phase: Phase) -> Format:
    if phase is Phase.ANSWER:
        return wanted
    begin = "" if phase.is_open else THINK_OPEN
    return _sequence({"type": "tag", "begin": begin, "content": _free_text(), "end": THINK_CLOSE}, wanted)


def _call(tool: Tool, form: Form, fits: bool) -> Format:
    schema = tool.parameters if fits and tool.parameters is not None else _ANY_OBJECT
    if form is Form.JSON:
        begin = f'{CALL_OPEN}\n{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "arguments": '
        content: Format = {"type": "json_schema", "json_schema": dict(schema)}
        return {"type": "tag", "begin": begin, "content": content, "end": f"}}\n{CALL_CLOSE}"}
    return {"type": "tag", "begin": f"{CALL_OPEN}{tool.name}\n", "content": _arguments(schema), "end": CALL_CLOSE}


def _arguments(root: Mapping[str, Any]) -> Format:
    """Keys and values of a schema: those that are required, and others or not, in its order.

    A schema that is no plain object, or names no argument and forbids none, leaves keys and values free.
    """
    schema: Any = root
    for _ in range(_FORMATS_DEPTH):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            break
        schema = dereference(root, schema["$ref"])
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if isinstance(properties, Mapping) and not any(word in schema for word in ("allOf", "anyOf", "oneOf", "$ref")):
        required = schema.get("required") or ()
        pairs = [
            pair if key in required else _optional(pair)
            for key, value in properties.items()
            for pair in [_argument(_text(key), _value(root, value, 0))]
        ]
        return _sequence(*pairs) if pairs else _text("")
    if isinstance(schema, Mapping) and schema.get("additionalProperties") is False:
        return _text("")
    return {"type": "star", "content": _argument({"type": "regex", "pattern": "[^<>\\n]+"}, _free_text())}


def _argument(key: Format, value: Format) -> Format:
    return _sequence(_text(KEY_OPEN), key, _text(f"{KEY_CLOSE}\n{VALUE_OPEN}"), value, _text(f"{VALUE_CLOSE}\n"))


def _value(root: Mapping[str, Any], schema: Any, depth: int) -> Format:
    """A value: a string is free text, or what its schema says in a regular expression; everything else is JSON."""
    if not isinstance(schema, Mapping) or depth > _FORMATS_DEPTH:
        return _free_text()
    if isinstance(schema.get("$ref"), str):
        return _value(root, dereference(root, schema["$ref"]), depth + 1)
    constants = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(constants, list) and constants:
        return _or([_text(each if isinstance(each, str) else json.dumps(each)) for each in constants])
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            return _or([_value(root, branch, depth + 1) for branch in schema[word]])
    if isinstance(schema.get("type"), list):
        return _or([_value(root, {**schema, "type": each}, depth + 1) for each in schema["type"]])
    types = types_of(root, schema)
    if "string" not in types:
        definitions = {word: root[word] for word in ("$defs", "definitions") if word in root}
        return {"type": "json_schema", "json_schema": {**definitions, **schema}}
    if types != {"string"}:
        return _free_text()
    if isinstance(schema.get("pattern"), str):
        return {"type": "regex", "pattern": _whole(schema["pattern"])}
    shortest, longest = schema.get("minLength"), schema.get("maxLength")
    if shortest is not None or longest is not None:
        bounds = f"{shortest or 0},{'' if longest is None else longest}"
        return {"type": "regex", "pattern": f"[^<]{{{bounds}}}"}
    return _free_text()


def _whole(pattern: str) -> str:
    """A pattern of JSON schema, which may match anywhere in a text, as one that matches the text from end to end."""
    begin = "" if pattern.startswith("^") else "[^<]*"
    end = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "[^<]*"
    inner = pattern.removeprefix("^")
    return f"{begin}({inner if end else inner[:-1]}){end}"


def _free_text() -> Format:
    return {"type": "any_text", "excludes": _TAGS}


def _text(value: str) -> Format:
    return {"type": "const_string", "value": value}


def _sequence(*elements: Format) -> Format:
    return {"type": "sequence", "elements": list(elements)}


def _optional(content: Format) -> Format:
    return {"type": "optional", "content": content}


def _or(elements: list[Format]) -> Format:
    return elements[0] if len(elements) == 1 else {"type": "or", "elements": elements}
