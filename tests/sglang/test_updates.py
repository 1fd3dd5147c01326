"""Weights that SGLang reads and writes otherwise than by a first load of published tensors."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from longcat_core import spellings
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


def test_weights_that_sglang_has_saved_are_the_same_when_it_loads_them(
    checkpoint_of: Callable[[Case], Path], tmp_path: Path
) -> None:
    prompts = CASE.prompts(2, 20)
    (tmp_path / "config.json").write_text(json.dumps(spellings.published(CASE.config)))
    with serving(checkpoint_of(CASE), tensor_parallel=2) as served:
        tokens = served.greedy(prompts, 8)
        served.sglang.save_sharded_model(path=str(tmp_path), pattern=None, max_size=None)
        assert served.greedy(prompts, 8) == tokens, "saving changes nothing"
    with serving(tmp_path, tensor_parallel=2, load_format="sharded_state") as served:
        assert served.greedy(prompts, 8) == tokens
        served.update({"model.norm.weight": CASE.published()["model.norm.weight"]})
        assert served.greedy(prompts, 8) == tokens, "a part of the weights can be updated"
