"""A tokenizer as a server needs it: it leaves a prompt open for its answer, and has a chat template."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import logging
from typing import Any

from longcat_core.chat.templates import choose

logger = logging.getLogger(__name__)


def prepare(tokenizer: Any) -> None:
    """`leave_open`, and LongCat's chat template, by the tokens, where the checkpoint brings none."""
    leave_open(tokenizer)
    if getattr(tokenizer, "chat_template", "") is None:
        template = choose(tokenizer.get_vocab())
        tokenizer.chat_template = template.text
        logger.info(
            "The checkpoint has no chat template. LongCat's %r is taken, as its tokens are of that format; "
            "--chat-template takes another.",
            template.name,
        )


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
