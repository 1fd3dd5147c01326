"""Steps with drafts that are one pass on a CPU, in bf16: which requests get them, and whether tokens are SGLang's."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from longcat_core.kernels.cpu import library
from longcat_nano import CHECKPOINT
from longcat_sglang.devices.cpu import greedy_chains
from tests.sglang.engine import Engine, serving

pytestmark = pytest.mark.skipif(not library.is_available(), reason=library.description())
NEW_TOKENS, PROMPT, OTHER = 24, list(range(5, 45)), list(range(60, 90))
OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "draft_tokens": 3, "prefix_caching": False}
GREEDY = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}


def _note_passes(noted: Path, is_one_pass: bool, patch: pytest.MonkeyPatch) -> None:
    verified = greedy_chains._verified

    def noting(*args: Any) -> Any:
        with noted.open("a") as lines:
            lines.write("pass\n")
        return verified(*args)

    patch.setattr(greedy_chains, "_verified", noting)
    if not is_one_pass:
        patch.setattr(greedy_chains, "_models", lambda *_: None)


def passes(noted: Path) -> int:
    """Since it was asked last."""
    found = len(noted.read_text().split()) if noted.exists() else 0
    noted.write_text("")
    return found


def asked(served: Engine, *sampling: dict[str, Any], **options: Any) -> list[list[int]]:
    outputs = served.sglang.generate(
        input_ids=[PROMPT, OTHER][: len(sampling)], sampling_params=[GREEDY | each for each in sampling], **options
    )
    return [output["output_ids"] for output in outputs]


def test_requests_that_want_more_than_tokens_go_sglangs_way(tmp_path: Path) -> None:
    noted = tmp_path / "noted"
    with serving(CHECKPOINT, **OPTIONS, broken=partial(_note_passes, noted, True), grammar_backend="none") as served:
        (alone,) = asked(served, {})
        assert 0 < passes(noted) < NEW_TOKENS
        for more in ({"frequency_penalty": 0.5}, {"logit_bias": {"7": 1.0}}):
            assert len(asked(served, more)[0]) == NEW_TOKENS
            assert not passes(noted), more
        (same,) = asked(served, {}, return_logprob=True)
        assert same == alone
        assert not passes(noted)
        first, _ = asked(served, {}, {"temperature": 1.0})
        assert first[:4] == alone[:4]
        # While the other is there, and one pass each when one is alone again.
        assert passes(noted) < NEW_TOKENS // 2


@pytest.mark.parametrize("requests", [1, 2])
def test_the_tokens_are_those_of_sglangs_own_steps(requests: int, tmp_path: Path) -> None:
    noted, found = tmp_path / "noted", list[list[list[int]]]()
    for is_one_pass in (True, False):
        with serving(CHECKPOINT, **OPTIONS, broken=partial(_note_passes, noted, is_one_pass)) as served:
            found.append(asked(served, *[{}] * requests))
        assert bool(passes(noted)) is is_one_pass
    ours, theirs = found
    assert ours == theirs
