"""What `longcat doctor` says of a checkpoint, whatever the engine."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

from longcat_core.drafting import gate as drafting
from longcat_core.plugin.diagnosis import checkpoint_findings
from tests.cases import drafting_tensors, write_checkpoint
from tests.speculation import CASE, the_gate


def test_a_gate_is_reported_with_its_threshold(gated: Path) -> None:
    whole, gate = checkpoint_findings(gated)
    assert (whole.problem, gate.problem) == ("", "")
    score = f"prunes drafts with a score under {the_gate().threshold:g}"
    assert gate.value == f"{score}, where a server is asked to use it"


def test_a_gate_of_another_model_is_a_problem(gated: Path, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, CASE.config, drafting_tensors(CASE.config, seed=7))
    drafting.save(the_gate(), directory, drafting.fingerprint(gated, CASE.config))
    _, gate = checkpoint_findings(directory)
    assert "belongs to another model" in gate.problem


def test_a_checkpoint_without_a_gate_is_one_line(tmp_path: Path) -> None:
    (whole,) = checkpoint_findings(write_checkpoint(tmp_path, CASE.config, drafting_tensors(CASE.config)))
    assert whole.problem == ""
