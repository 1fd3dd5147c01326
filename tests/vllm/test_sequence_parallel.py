"""Where vLLM's ranks that have the same tokens share experts with ranks that have others."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.cases import Case
from tests.collectives import noted
from tests.engines.test_scheduling import CASE, assert_true
from tests.vllm.engine import noting_collectives, serving


def test_each_sends_a_share_of_the_tokens_and_the_outputs_are_summed_once(
    checkpoint_of: Callable[[Case], Path], tmp_path: Path
) -> None:
    """Two such ranks and no others: what a CPU can run of it. The prompts' lengths are odd and even."""
    notes, layers = tmp_path / "notes", CASE.config.num_layers
    arguments = noting_collectives(notes) | {
        "worker_extension_cls": "tests.vllm.sequence_parallel.SequenceParallel",
    }
    with serving(checkpoint_of(CASE), tensor_parallel=2, expert_parallel=True, **arguments) as served:
        assert_true(served)
    wanted = {"all_reduce": 1 + 4 * layers, "all_gather": layers, "all_gatherv": layers, "reduce_scatterv": layers}
    assert noted(notes)
    assert all(each.collectives == wanted for each in noted(notes))
