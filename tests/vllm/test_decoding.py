"""Decode steps on a CPU in which vLLM's modules have to be called; `engines/test_decoding.py` has the others."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest

from longcat_core.kernels.cpu import library
from longcat_core.kernels.cpu.decoder import DecoderLayer
from longcat_nano import CHECKPOINT
from tests.harness import engine

pytestmark = pytest.mark.skipif(not library.is_available(), reason=library.description())
NEW_TOKENS, PROMPT = 12, list(range(5, 45))
OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "prefix_caching": False}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of core's layers."""
    call, noted = DecoderLayer.__call__, list[int]()

    def noting(layer: DecoderLayer, *args: Any) -> Any:
        noted.append(len(args[0]))
        return call(layer, *args)

    monkeypatch.setattr(DecoderLayer, "__call__", noting)
    return noted


def test_a_module_that_a_user_hooks_is_called_as_long_as_it_is_hooked(passes: list[int]) -> None:
    seen: list[int] = []
    with engine.serving(CHECKPOINT, **OPTIONS) as served:
        first = served.greedy([PROMPT], NEW_TOKENS)
        assert passes.count(1) >= NEW_TOKENS - 1
        layers: Any = served.model.model.layers  # type: ignore[union-attr]  # torch's annotation of attributes
        handle = layers[1].mlp.router.register_forward_hook(lambda _module, given, _output: seen.append(len(given[0])))
        passes.clear()
        assert served.greedy([PROMPT], NEW_TOKENS) == first
        assert not passes
        assert seen.count(1) >= NEW_TOKENS - 1
        handle.remove()
        served.greedy([PROMPT], NEW_TOKENS)
        assert passes


def test_layers_that_adapters_change_are_called(passes: list[int]) -> None:
    with engine.serving(CHECKPOINT, **OPTIONS, enable_lora=True, max_lora_rank=8) as served:
        served.greedy([PROMPT], NEW_TOKENS)
    assert not passes
