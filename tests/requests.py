"""What the HTTP tests ask for, and how a bad request is written down; what is said of it, each engine says its way."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any, NamedTuple

from tests.cases import CASES

CASE = CASES["default"]
MODEL = "longcat"
MAX_MODEL_LEN = 256
CACHE_TOKENS = 640
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
VOCABULARY = CASE.config.vocab_size
LONG_CHAT = {"messages": [{"role": "user", "content": "zero " * MAX_MODEL_LEN}]}


class Bad(NamedTuple):
    status: int
    message: str
    """A part of it."""
    path: str = COMPLETIONS
    changes: dict[str, Any] | None = None
    content: str | None = None
