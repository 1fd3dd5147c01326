"""Decode steps in bf16 on a CPU, of which each layer is one object of core's, against those of the engine's layers."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
from torch import Tensor

from longcat_core.kernels.cpu import library
from longcat_core.kernels.cpu.decoder import DecoderLayer
from longcat_nano import CHECKPOINT
from tests.harness import engine
from tests.noted_rows import note_rows

pytestmark = pytest.mark.skipif(not library.is_available(), reason=library.description())
NEW_TOKENS, LAYERS, VOCABULARY = 24, 2, 2048
PROMPTS = [list(range(5 + 7 * n, 45 + 9 * n)) for n in range(3)]
TOLERANCE = {"vLLM": 0.25, "SGLang": 0.0}[engine.NAME]
"""Of log-probabilities. vLLM's own layers round to bf16 between the operators of an attention and of a dense FFN, which
SGLang's call in core's kernels as well; logits of up to 32 in bf16 are 0.125 apart."""
WITHIN = {"vLLM": 0.9, "SGLang": 1.0}[engine.NAME]
"""The share of steps that are: rounding can make an expert another, where two are as good."""


def _note_passes(noted: Path, is_compiled: bool, patch: pytest.MonkeyPatch) -> None:
    note_rows(DecoderLayer, noted, patch)
    if not is_compiled:
        patch.setattr(import_module(f"{engine.PACKAGE}.devices.cpu.decoding"), "_compiled", lambda _: None)


def _decoded(noted: Path, is_compiled: bool) -> tuple[list[Tensor], list[int]]:
    """Log-probabilities [new tokens, vocabulary], of one request after the other and then of all at once, and the rows
    of each compiled layer's calls."""
    noted.write_text("")
    options, answers = {"dtype": "bfloat16", "prefix_caching": False}, list[Tensor]()
    with engine.serving(CHECKPOINT, **options, broken=partial(_note_passes, noted, is_compiled)) as served:
        for prompts in (*([prompt] for prompt in PROMPTS), PROMPTS):
            answers += served.greedy_log_softmax(prompts, NEW_TOKENS, VOCABULARY)
    return answers, [int(line) for line in noted.read_text().split()]


def test_decode_steps_of_cores_layers_are_those_of_the_engines(tmp_path: Path) -> None:
    ours, rows = _decoded(tmp_path / "noted", is_compiled=True)
    theirs, none = _decoded(tmp_path / "noted", is_compiled=False)
    assert not none
    assert rows.count(1) >= LAYERS * len(PROMPTS) * (NEW_TOKENS - 1)
    assert rows.count(len(PROMPTS)) > LAYERS
    assert len(ours) == len(theirs) == 2 * len(PROMPTS)
    differences = list[float]()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape == (NEW_TOKENS, VOCABULARY)
        # As long as both chose the same tokens, and the step in which they part, between two that are as likely.
        same = int((mine.argmax(dim=-1) == other.argmax(dim=-1)).int().cumprod(dim=0).sum())
        differences += (mine - other)[: same + 1].abs().amax(dim=-1).tolist()
    assert len(differences) > len(ours) * NEW_TOKENS / 2
    assert sum(each <= TOLERANCE for each in differences) >= WITHIN * len(differences)
