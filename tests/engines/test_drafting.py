"""Drafts in bf16 on a CPU, which come from core's kernels, against those of the engine's own way through its layers."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

from longcat_core.kernels.cpu import library
from longcat_core.kernels.cpu.mtp import MtpLayer
from longcat_nano import CHECKPOINT
from tests.harness import engine
from tests.noted_rows import note_rows
from tests.speculation import Speculated

pytestmark = pytest.mark.skipif(not library.is_available(), reason=library.description())
DRAFTS, PROMPT, NEW_TOKENS, LONGEST = 3, 48, 64, 160
PROMPTS = [list(range(5 + 7 * n, 5 + 7 * n + PROMPT)) for n in range(8)]
AT_THE_END = [list(range(90, 90 + LONGEST - 20))]
"""A prompt after which drafts reach beyond the longest context, where SGLang does not keep room for them."""
LAST_TOKENS = {"vLLM": 18, "SGLang": 14}[engine.NAME]


def _note_chains(noted: Path, is_compiled: bool, patch: pytest.MonkeyPatch) -> None:
    note_rows(MtpLayer, noted, patch, "chain", argument=1)
    if not is_compiled:
        patch.setattr(import_module(f"{engine.PACKAGE}.devices.cpu.drafting"), "_compiled", lambda _: None)


def _drafted(noted: Path, is_compiled: bool) -> tuple[list[Speculated], list[Speculated], list[int]]:
    """Of `PROMPTS`, of `AT_THE_END`, and the requests of each compiled chain."""
    noted.write_text("")
    options = {"dtype": "bfloat16", "draft_tokens": DRAFTS, "prefix_caching": False, "max_model_len": LONGEST}
    with engine.serving(CHECKPOINT, **options, broken=partial(_note_chains, noted, is_compiled)) as served:
        many, last = served.speculated(PROMPTS, NEW_TOKENS), served.speculated(AT_THE_END, LAST_TOKENS)
    return many, last, [int(line) for line in noted.read_text().split()]


def test_drafts_of_cores_kernels_are_those_of_the_engines_own_layers(tmp_path: Path) -> None:
    ours, our_last, chains = _drafted(tmp_path / "noted", is_compiled=True)
    theirs, their_last, none = _drafted(tmp_path / "noted", is_compiled=False)
    assert not none
    steps = max(len(answer.accepted) for answer in ours)
    assert len(chains) >= steps
    assert all(1 <= requests <= len(PROMPTS) for requests in chains)
    for mine, other in ((ours, theirs), (our_last, their_last)):
        assert [len(answer.tokens) for answer in mine] == [len(answer.tokens) for answer in other]
        accepted, wanted = (sum(sum(answer.accepted) for answer in answers) for answers in (mine, other))
        assert wanted > len(other) * 3
        # In bf16 the two round differently, so that a draft that is no clear choice may be another.
        assert accepted == pytest.approx(wanted, rel=0.1)
