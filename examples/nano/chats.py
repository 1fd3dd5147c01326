"""Conversations out of source files: the first line of a function's docstring asks, and its source answers."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ast
import hashlib
import io
import textwrap
from collections.abc import Iterator, Mapping

_LONGEST_QUESTION, _LONGEST_ANSWER = 160, 1200
"""Characters: a question is one line, and both fit into a window."""


def chats(texts: Mapping[str, str], share: float) -> list[str]:
    """A share of the functions of source files, by a hash of question and answer, as LongCat's chat template writes one
    round, without the `</longcat_s>` that ends it.

    texts: by path, of which those that do not parse as Python are passed over.
    """
    rounds = [chat(*each) for text in texts.values() for each in explained(text)]
    return [each for each in rounds if hashlib.sha256(each.encode()).digest()[0] < 256 * share]


def chat(question: str, answer: str) -> str:
    return f"[Round 0] USER:{question} ASSISTANT:{answer}"


def explained(text: str) -> Iterator[tuple[str, str]]:
    """Every function with a docstring: the first line of it, and the function's source, not indented."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = list(io.StringIO(text))  # which end where Python's do
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (explained := ast.get_docstring(node)):
            question = explained.strip().split("\n")[0].strip()
            answer = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
            if question and len(question) <= _LONGEST_QUESTION and len(answer) <= _LONGEST_ANSWER:
                yield question, answer
