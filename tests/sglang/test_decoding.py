"""Decode steps in bf16 on a CPU, whose layers are one object of core's each, against those through SGLang's layers."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from longcat_core.kernels.cpu import library
from longcat_core.kernels.cpu.decoder import DecoderLayer
from longcat_nano import CHECKPOINT
from longcat_sglang.devices.cpu import decoding
from tests.harness import engine

pytestmark = pytest.mark.skipif(not library.is_available(), reason=library.description())
NEW_TOKENS, LAYERS = 24, 2
PROMPTS = [list(range(5 + 7 * n, 45 + 9 * n)) for n in range(3)]


def _note_passes(noted: Path, is_compiled: bool, patch: pytest.MonkeyPatch) -> None:
    call = DecoderLayer.__call__

    def noting(layer: DecoderLayer, *args: Any) -> Any:
        with noted.open("a") as lines:
            lines.write(f"{len(args[0])}\n")
        return call(layer, *args)

    patch.setattr(DecoderLayer, "__call__", noting)
    if not is_compiled:
        patch.setattr(decoding, "_compiled", lambda _: None)


def _decoded(noted: Path, is_compiled: bool) -> tuple[list[Any], list[int]]:
    """Tokens with their log-probabilities, one request after the other, and the rows of each compiled layer's calls."""
    noted.write_text("")
    options, answers = {"dtype": "bfloat16", "prefix_caching": False}, []
    with engine.serving(CHECKPOINT, **options, broken=partial(_note_passes, noted, is_compiled)) as served:
        for prompt in PROMPTS:
            (output,) = served.outputs([prompt], NEW_TOKENS, return_logprob=True)
            answers.append(output["meta_info"]["output_token_logprobs"])
    return answers, [int(line) for line in noted.read_text().split()]


def test_decode_steps_of_cores_layers_are_those_of_sglangs_to_the_bit(tmp_path: Path) -> None:
    ours, rows = _decoded(tmp_path / "noted", is_compiled=True)
    theirs, none = _decoded(tmp_path / "noted", is_compiled=False)
    assert not none
    assert rows.count(1) >= LAYERS * len(PROMPTS) * (NEW_TOKENS - 1)
    assert [len(answer) for answer in ours] == [NEW_TOKENS] * len(PROMPTS)
    assert ours == theirs


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
        served.greedy(PROMPTS[:1], NEW_TOKENS)
    assert noted.read_text().split().count("1") >= NEW_TOKENS - 1
