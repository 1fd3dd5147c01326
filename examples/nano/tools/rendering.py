"""Conversations as the servers render them, and as tokens of which some are the assistant's own."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import jinja2
from tokenizers import Tokenizer

from longcat_core.chat.templates import THINKING_2601

DECLARATION_END = "</longcat_tool_declare>"
_TURN = re.compile("<longcat_assistant>(.*?</longcat_s>)", re.DOTALL)
_OPENED = re.compile("<longcat_assistant><longcat_think>\n(.*?</longcat_s>)", re.DOTALL)
"""An assistant's turn without what a prompt has of it."""


def render(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], thinking: bool, prompt: bool) -> str:
    """The text of a conversation by the template of Thinking-2601, as `apply_chat_template` of transformers has it.

    prompt: whether the assistant's next turn is opened behind it.
    """
    return _template().render(
        messages=messages, tools=tools or None, enable_thinking=thinking, add_generation_prompt=prompt
    )


class Tokens(NamedTuple):
    ids: list[int]
    said: list[bool]
    """Whether a token is the assistant's own, in its turns since the last question; the others were given to it."""
    declared: int
    """The tokens of the declaration of tools, which come first."""


def encode(
    tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], thinking: bool
) -> Tokens:
    """A conversation that ends with the assistant's answer."""
    text = render(messages, tools, thinking, prompt=False)
    turns = _OPENED if thinking else _TURN
    spans = [turn.span(1) for turn in turns.finditer(text, text.rindex("<longcat_user>"))]
    encoding = tokenizer.encode(text)
    said = [any(first <= start and end <= last for first, last in spans) for start, end in encoding.offsets]
    declaration = text.find(DECLARATION_END) + len(DECLARATION_END) if tools else 0
    return Tokens(encoding.ids, said, sum(end <= declaration for _, end in encoding.offsets))


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    # Jinja's own escapes for HTML and sorts keys.
    environment.filters["tojson"] = lambda content: json.dumps(content, ensure_ascii=False)
    return environment.from_string(THINKING_2601.text)
