"""The tools of a request, in each form in which the engines' APIs give them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tool:
    name: str
    parameters: Mapping[str, Any] | None = None
    """JSON schema of the arguments; None: nothing is known of them."""
    strict: bool | None = None
    """Whether the request wants arguments that fit the schema; None: it does not say."""

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Tool:
        """Of a tool as `/v1/chat/completions` has it (`function` within it), or `/v1/responses` (`name` beside `type`).

        Raises:
            ValueError: if it has no name.
        """
        function = raw.get("function") or raw
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"a tool's name: {name!r}, wanted a text that is not empty, in {dict(raw)!r}")
        parameters = function.get("parameters")
        return cls(name, parameters if isinstance(parameters, Mapping) else None, function.get("strict"))


def resolve(name: str, tools: Mapping[str, Tool]) -> str:
    """The name of the tool that is meant: models also write `functions.NAME`, after another format."""
    if name not in tools:
        bare = name.removeprefix("functions.").removeprefix("function.")
        if bare in tools:
            return bare
    return name
