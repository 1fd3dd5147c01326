"""vLLM's options: what becomes of each with LongCat-Flash, as data, and the refusals that need no room of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def unsupported(vllm_config: VllmConfig) -> list[str]:
    return []
