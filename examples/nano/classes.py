"""What the router spends on the tokens of each class of Python's: indentation, keywords, names, numbers, and so on."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import io
import keyword
import math
import tokenize
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from longcat_core.inspection import inspect
from longcat_core.reference import LongcatForCausalLM

INDENTATION = "indentation"
_KINDS = {tokenize.NUMBER: "number", tokenize.STRING: "string", tokenize.COMMENT: "comment"}


class Mean(NamedTuple):
    mean: float
    error: float
    """Standard error of the mean."""


class Spent(NamedTuple):
    """FFN experts a token and layer, on the tokens of one class."""

    tokens: int
    read: Mean
    """On the tokens themselves, from which the model makes out what follows them."""
    predicted: Mean
    """On the tokens before them, from which the model makes out these."""
    nats: float
    """The mean surprisal of such a token."""
    drafts_accepted: float | None
    """Share of the positions of such tokens at which an engine would accept the draft; None without an MTP layer."""


def spent(
    model: LongcatForCausalLM, tokenizer: Tokenizer, texts: Iterable[str], sequence_length: int
) -> dict[str, Spent]:
    """By class, the cheapest to read first; texts that are not Python are passed over.

    Each text is read in pieces of `sequence_length` tokens, of which the first has nothing before it.
    """
    rows: dict[str, list[tuple[float, float, float, float]]] = {}
    for text in texts:
        encoding = tokenizer.encode(text)
        classes = classify(text, encoding.offsets)
        if classes is None:
            continue
        for start in range(0, len(encoding.ids), sequence_length):
            window = slice(start, start + sequence_length)
            found = inspect(model, encoding.ids[window])
            experts = found.ffn_experts.double().mean(dim=0).tolist()
            nats = found.nats.tolist()
            drafts = [math.nan] * len(experts) if found.drafts is None else found.drafts.double().tolist()
            for n, name in enumerate(classes[window]):
                if n >= 2:  # the first places have nothing before them, or no draft
                    rows.setdefault(name, []).append((experts[n], experts[n - 1], nats[n], drafts[n]))
    by_class = {name: _spent(values) for name, values in rows.items() if len(values) > 1}
    return dict(sorted(by_class.items(), key=lambda item: item[1].read.mean))


def classify(text: str, offsets: Sequence[tuple[int, int]]) -> list[str] | None:
    """The class of each of a tokenizer's tokens, which stand for the characters from one offset to another: that of
    its first character that is no space. None if the text is not Python.
    """
    kinds = _kinds(text)
    if kinds is None:
        return None
    classes = []
    for start, stop in offsets:
        seen = next((place for place in range(start, stop) if not text[place].isspace()), None)
        classes.append(INDENTATION if seen is None else kinds[seen])
    return classes


def _kinds(text: str) -> list[str] | None:
    """The class of each character, as Python's own tokenizer sees it."""
    begins = [0]
    for line in io.StringIO(text):  # which ends lines where the tokenizer does
        begins.append(begins[-1] + len(line))
    kinds = ["operator"] * len(text)
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if kind := _kind(token):
                start, stop = (begins[row - 1] + column for row, column in (token.start, token.end))
                kinds[start:stop] = [kind] * (stop - start)
    except (tokenize.TokenError, SyntaxError):
        return None
    return kinds


def _kind(token: tokenize.TokenInfo) -> str | None:
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else "name"
    if token.type == tokenize.OP:
        return "closing bracket" if token.string in ")]}" else "operator"
    # Python 3.12 takes f-strings apart.
    return "string" if tokenize.tok_name[token.type].startswith("FSTRING") else _KINDS.get(token.type)


def _spent(values: list[tuple[float, float, float, float]]) -> Spent:
    read, predicted, nats, drafts = torch.tensor(values, dtype=torch.float64).unbind(dim=1)
    return Spent(
        tokens=len(values),
        read=_mean(read),
        predicted=_mean(predicted),
        nats=float(nats.mean()),
        drafts_accepted=None if drafts.isnan().any() else float(drafts.mean()),
    )


def _mean(values: torch.Tensor) -> Mean:
    return Mean(float(values.mean()), float(values.std() / math.sqrt(len(values))))
