"""Decode steps on a CPU with modules that a user hooks; `engines/test_decoding.py` has the others."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longcat_core.kernels.cpu import library
from longcat_nano import CHECKPOINT
from tests.harness import engine

pytestmark = pytest.mark.skipif(not library.is_available(), reason=library.description())
NEW_TOKENS, PROMPT = 24, list(range(5, 45))


def noting_hook(config: dict[str, str]) -> Any:
    """As SGLang's --forward-hooks names it."""

    def note(_module: Any, given: Any, _output: Any) -> None:
        with Path(config["file"]).open("a") as lines:
            lines.write(f"{len(given[0])}\n")

    return note


def test_a_module_that_a_user_hooks_is_called_in_decode_steps(tmp_path: Path) -> None:
    noted, factory = tmp_path / "noted", f"{__name__}:{noting_hook.__name__}"
    hook = {"target_modules": ["model.layers.0.mlp.router"], "hook_factory": factory, "config": {"file": str(noted)}}
    with engine.serving(CHECKPOINT, dtype="bfloat16", prefix_caching=False, forward_hooks=[hook]) as served:
        served.greedy([PROMPT], NEW_TOKENS)
    assert noted.read_text().split().count("1") >= NEW_TOKENS - 1
