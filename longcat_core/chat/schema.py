"""Which JSON types a tool's schema allows for an argument."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

Types: TypeAlias = frozenset[str]
"""Names of JSON schema, without `integer`, which is a `number`."""

ANY: Types = frozenset({"string", "number", "boolean", "null", "array", "object"})

_DEPTH = 32
"""Of references that lead to references: more are taken for a circle."""


def argument_types(parameters: Mapping[str, Any] | None, name: str) -> Types:
    """What the argument `name` may be by the schema of all arguments; anything, if the schema says nothing of it."""
    schemas = list(argument_schemas(parameters, name))
    return _union(parameters, schemas) if schemas else ANY


def argument_names(parameters: Mapping[str, Any] | None) -> frozenset[str]:
    """All arguments that the schema names."""
    return frozenset(name for schema in _objects(parameters, parameters, 0) for name in _mapping(schema, "properties"))


def argument_schemas(parameters: Mapping[str, Any] | None, name: str) -> Iterator[Any]:
    """What the schema says of an argument: once, or once for each object that the arguments may be."""
    for schema in _objects(parameters, parameters, 0):
        properties = _mapping(schema, "properties")
        if name in properties:
            yield properties[name]
            continue
        patterns = [value for pattern, value in _mapping(schema, "patternProperties").items() if _fits(pattern, name)]
        if patterns:
            yield from patterns
        elif isinstance(schema.get("additionalProperties"), Mapping):
            yield schema["additionalProperties"]


def types_of(root: Mapping[str, Any] | None, schema: Any, depth: int = 0) -> Types:
    """The types that a schema allows. `root` is where its references start."""
    if not isinstance(schema, Mapping) or depth > _DEPTH:
        return ANY
    types = ANY
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], (list, tuple)) else [schema["type"]]
        types &= frozenset("number" if name == "integer" else name for name in names)
        if schema.get("nullable") is True:  # OpenAPI's word for a union with null
            types |= {"null"}
    if "const" in schema:
        types &= {_type(schema["const"])}
    if isinstance(schema.get("enum"), (list, tuple)):
        types &= frozenset(map(_type, schema["enum"]))
    if isinstance(schema.get("$ref"), str):
        types &= types_of(root, dereference(root, schema["$ref"]), depth + 1)
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), (list, tuple)):
            types &= frozenset().union(*(types_of(root, branch, depth + 1) for branch in schema[word]))
    if isinstance(schema.get("allOf"), (list, tuple)):
        for branch in schema["allOf"]:
            types &= types_of(root, branch, depth + 1)
    return types or ANY


def dereference(root: Mapping[str, Any] | None, reference: str) -> Any:
    """What `#/...` points to; None if it points elsewhere or to nothing."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    found: Any = root
    for part in reference.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping):
            found = found.get(name)
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found


def _objects(root: Mapping[str, Any] | None, schema: Any, depth: int) -> Iterator[Mapping[str, Any]]:
    """The schemas of objects in the schema of all arguments, which may be put together of several."""
    if not isinstance(schema, Mapping) or depth > _DEPTH:
        return
    yield schema
    if isinstance(schema.get("$ref"), str):
        yield from _objects(root, dereference(root, schema["$ref"]), depth + 1)
    for word in ("allOf", "anyOf", "oneOf"):
        for branch in schema.get(word) or ():
            yield from _objects(root, branch, depth + 1)


def _union(root: Mapping[str, Any] | None, schemas: list[Any]) -> Types:
    return frozenset().union(*(types_of(root, schema) for schema in schemas))


def _mapping(schema: Mapping[str, Any], word: str) -> Mapping[str, Any]:
    value = schema.get(word)
    return value if isinstance(value, Mapping) else {}


def _fits(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False


def _type(value: Any) -> str:
    first = json.dumps(value)[0]
    return {'"': "string", "{": "object", "[": "array", "t": "boolean", "f": "boolean", "n": "null"}.get(
        first, "number"
    )
