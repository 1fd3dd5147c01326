"""The chat templates of LongCat-Flash-Chat, Thinking and Thinking-2601, for checkpoints that bring none."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from longcat_core.chat.tags import (
    CALL_CLOSE,
    CALL_OPEN,
    KEY_CLOSE,
    KEY_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    VALUE_CLOSE,
    VALUE_OPEN,
)

_DIRECTORY = Path(__file__).with_name("templates")


class Form(Enum):
    """How a checkpoint has learnt to write calls."""

    JSON = "a JSON object with name and arguments"
    XML = "the name, then keys and values in tags"


@dataclass(frozen=True)
class Template:
    name: str
    form: Form
    markers: tuple[str, ...]
    """Tags that are one token each in a checkpoint that has learnt this format, and stay in decoded text."""

    @property
    def path(self) -> Path:
        """Its file."""
        return _DIRECTORY / f"{self.name}.jinja"

    @property
    def text(self) -> str:
        """The template, in Jinja."""
        return self.path.read_text(encoding="utf-8")


_MARKERS = (CALL_OPEN, CALL_CLOSE, THINK_OPEN, THINK_CLOSE)
_TURNS = ("longcat_system", "longcat_user", "longcat_assistant", "longcat_observation")
_PAIRS = ("longcat_tool_declare", "longcat_tool_response")

CHAT = Template("chat", Form.JSON, _MARKERS)
THINKING = Template("thinking", Form.JSON, _MARKERS)
THINKING_2601 = Template(
    "thinking-2601",
    Form.XML,
    (
        *(*_MARKERS, KEY_OPEN, KEY_CLOSE, VALUE_OPEN, VALUE_CLOSE),
        *(f"<{name}>" for name in _TURNS),
        *(tag for name in _PAIRS for tag in (f"<{name}>", f"</{name}>")),
    ),
)
TEMPLATES = {template.name: template for template in (CHAT, THINKING, THINKING_2601)}


def choose(vocabulary: Container[str]) -> Template:
    """The template for a checkpoint that brings none, by its tokens: the tags of arguments are 2601's, those around
    reasoning Thinking's. LongCat-Flash-Chat may have the latter as well, and can then be told by its name alone."""
    if KEY_OPEN in vocabulary:
        return THINKING_2601
    return THINKING if THINK_OPEN in vocabulary else CHAT


def form_of(template: str | None, vocabulary: Container[str]) -> Form:
    """The form of calls that a checkpoint has learnt, by its template, or by its tokens if it brings none."""
    if template is None:
        return choose(vocabulary).form
    return Form.XML if KEY_OPEN in template else Form.JSON
