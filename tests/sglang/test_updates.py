"""Weights that a running SGLang reads from a disk, where it does not undo what was packed after the first load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.cases import CASES, Case, write_checkpoint
from tests.oracle import assert_greedy_equal, greedy, oracle
from tests.sglang.engine import serving

CASE = CASES["default"]


def test_an_update_from_a_disk_is_in_the_next_token(checkpoint_of: Callable[[Case], Path], tmp_path: Path) -> None:
    tensors, prompt = CASE.published(seed=1), CASE.prompts(1, 20)[0]
    before, after = (greedy(oracle(CASE.config, weights), prompt, 8) for weights in (CASE.published(), tensors))
    assert [choice.token for choice in before] != [choice.token for choice in after]
    with serving(checkpoint_of(CASE), prefix_caching=False) as served:
        assert_greedy_equal(served.greedy([prompt], 8)[0], before)
        succeeded, message, *_ = served.sglang.update_weights_from_disk(
            str(write_checkpoint(tmp_path, CASE.config, tensors))
        )
        assert succeeded, message
        assert_greedy_equal(served.greedy([prompt], 8)[0], after)
