"""Wrappers that concern single requests: how a prompt becomes tokens."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from longcat_core.tokenization import leave_open

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.renderers.hf import HfRenderer


def render_without_an_end(
    original: Callable[..., None], renderer: HfRenderer, config: VllmConfig, tokenizer: Any, *args: Any, **kwargs: Any
) -> None:
    """Before vLLM copies the tokenizer for its threads."""
    leave_open(tokenizer)
    original(renderer, config, tokenizer, *args, **kwargs)
