"""A tokenizer whose file has it end every text, as LongCat's does, made to leave a prompt open for its answer."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from typing import Any


def leave_open(tokenizer: Any) -> None:
    """Have a tokenizer of transformers append no end of sequence, in place; what it puts before a text stays.

    LongCat-Flash is published with `add_eos_token`, which is meant for training. transformers 5 does not read that
    where there is a `tokenizer.json`, but saves it into that file, as a template with the token at its end. A prompt
    that ends with it is over before its answer begins.
    """
    backend = getattr(tokenizer, "_tokenizer", None)
    processor = getattr(backend, "post_processor", None)
    if backend is None or processor is None:
        return
    state = json.loads(processor.__getstate__())
    if _open(state, tokenizer.eos_token_id):
        processor.__setstate__(json.dumps(state).encode())
        backend.post_processor = processor


def _open(state: dict[str, Any], end: int | None) -> bool:
    """Take the end out of every template of a post-processor's state; whether there was one."""
    changed = [_open(each, end) for each in state.get("processors", ())]  # of a sequence
    if state["type"] == "TemplateProcessing":
        for template in (state["single"], state["pair"]):
            while template and _ids(template[-1], state) == [end]:
                template.pop()
                changed.append(True)
    return any(changed)


def _ids(piece: dict[str, Any], state: dict[str, Any]) -> list[int]:
    token = piece.get("SpecialToken")
    ids: list[int] = state["special_tokens"][token["id"]]["ids"] if token else []
    return ids
