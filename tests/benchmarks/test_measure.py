"""The command that measures a GPU: whole, with tiny sizes in Triton's interpreter, and stages that go wrong."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import measure
from benchmarks.gpu.measured import Measured
from tests.benchmarks import stand_ins

ROOT = Path(__file__).parents[2]
STAGES = [stage.name for stage in measure.STAGES]


def run(module: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measured") / "tiny.json"
    run("benchmarks.gpu.measure", "--tiny", "--minutes", "8", "--limit", "240", "--out", str(path))
    return path


@pytest.fixture(scope="module")
def record(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_every_stage_runs_in_the_interpreter(record: dict[str, Any]) -> None:
    assert list(record["stages"]) == STAGES
    assert {name: stage["state"] for name, stage in record["stages"].items()} == dict.fromkeys(STAGES, "complete")
    faults = [row for stage in record["stages"].values() for row in stage["rows"] if "error" in row or "wrong" in row]
    assert faults == []


def test_what_needs_a_gpu_says_so(record: dict[str, Any]) -> None:
    measured = Measured(record)
    missing = [row for stage in STAGES for row in measured.rows(stage) if "missing" in row]
    assert {row["missing"] for row in missing} == {
        "vLLM's kernels are measured on a GPU alone",
        "vLLM end to end is measured on a GPU alone",
        "needs a GPU",
    }
    assert all("ours" not in row["case"].values() for row in missing)


def test_our_kernels_are_right_before_they_are_timed(record: dict[str, Any]) -> None:
    """In both precisions, with zero experts dropped and remapped, in either deployment, with any routing."""
    rows = [row for row in Measured(record).rows("moe") if row["case"]["kernel"].startswith("ours")]
    fields = ("precision", "deployment", "routing", "kernel")
    cases = {tuple(row["case"][field] for field in fields) for row in rows}
    assert len(cases) == 2 * 3 * 2  # precisions; tensor, data, and tensor skewed; dropped and remapped
    for row in rows:
        assert row["result"]["us"] > 0
        assert 0 < row["result"]["worst_token_error"] < 0.02
    tiles = Measured(record).rows("tiles")
    assert {row["case"]["precision"] for row in tiles} == {"16 bit", "fp8"}
    assert all("result" in row for row in tiles)


def test_the_record_says_what_was_measured_where(record: dict[str, Any]) -> None:
    assert record["device"] == "Triton's interpreter on a CPU"
    assert record["is_tiny"] is True
    assert record["kernels"] == measure.kernels_digest()
    versions = Measured(record).identity["versions"]
    assert versions.keys() == {"python", "torch", "triton", "vllm", "transformers", "longcat-serving"}


def test_the_report_is_made_of_what_was_measured(file: Path) -> None:
    run("benchmarks.gpu.report", str(file))
    page = file.with_suffix(".md").read_text()
    assert "the times mean nothing" in page
    assert file.with_suffix(".png").stat().st_size > 10_000
    for title in ("Stages", "Device", "Tests", "MoE layer: fp8", "Small kernels", "Best tiles", "One rank of EP 2"):
        assert f"## {title}" in page
    assert "## Goals" not in page, "an interpreter meets none, and misses none"


Record = dict[str, Any]


@pytest.fixture
def measured_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Record, list[str]]]:
    """Run the command with a stand-in for the stages' processes; the record, and the lines of the summary."""

    def measured_by(work: Callable[..., None], *arguments: str) -> Record:
        monkeypatch.setattr(measure, "_work", work)
        out = tmp_path / "out.json"
        measure.main(["--tiny", "--out", str(out), *arguments])
        found: Record = json.loads(out.read_text())
        return found

    monkeypatch.setenv("TRITON_INTERPRET", "0")  # what the command sets is put back
    monkeypatch.setattr(measure, "PRELOADED", [])
    monkeypatch.setattr(measure, "_LEAST_SECONDS", 0.5)
    monkeypatch.setattr(measure.signal, "signal", lambda *_: None)
    return measured_by


def cases(stage: Record) -> list[dict[str, int]]:
    return [row["case"] for row in stage["rows"]]


def test_a_stage_that_hangs_is_cut_off_and_leaves_its_rows(measured_by: Any) -> None:
    record = measured_by(stand_ins.hangs_after_two, "--only", "moe", "tiles", "--limit", "1.5")
    for name in ("moe", "tiles"):
        assert record["stages"][name]["state"] == "cut off"
        assert cases(record["stages"][name]) == stand_ins.CASES[:2]


def test_a_row_is_in_the_file_as_soon_as_it_is_measured(measured_by: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = measure.write, list[int]()

    def write(path: Path, record: Record) -> None:
        real(path, record)
        written.append(len(json.loads(path.read_text())["stages"]["moe"]["rows"]))

    monkeypatch.setattr(measure, "write", write)
    measured_by(stand_ins.device_fails, "--only", "moe")
    assert written == [1, 2, 3, 4, 4]


def test_the_next_run_goes_on_where_one_was_cut_off(measured_by: Any) -> None:
    measured_by(stand_ins.hangs_after_two, "--only", "moe", "--limit", "1.5")
    record = measured_by(stand_ins.dies_after_one, "--only", "moe")
    assert cases(record["stages"]["moe"]) == stand_ins.CASES
    assert record["stages"]["moe"]["state"] == "complete"
    assert "error" not in record["stages"]["moe"]


def test_a_process_that_dies_is_followed_by_one_without_its_rows(measured_by: Any) -> None:
    record = measured_by(stand_ins.dies_after_one, "--only", "moe")
    assert cases(record["stages"]["moe"]) == stand_ins.CASES
    assert record["stages"]["moe"]["state"] == "complete"


def test_after_a_stage_that_fails_the_next_one_runs(measured_by: Any) -> None:
    record = measured_by(stand_ins.device_fails, "--only", "device", "moe")
    assert record["stages"]["device"]["state"] == "failed"
    assert record["stages"]["device"]["error"] == "ValueError: no such thing"
    assert cases(record["stages"]["moe"]) == stand_ins.CASES


def test_without_time_no_stage_is_started(measured_by: Any) -> None:
    record = measured_by(stand_ins.hangs_after_two, "--minutes", "0.005")
    assert {stage["state"] for stage in record["stages"].values()} == {"not started"}


def test_what_was_missing_is_measured_by_the_next_run(measured_by: Any) -> None:
    first = measured_by(stand_ins.misses_the_last, "--only", "moe")
    assert "missing" in first["stages"]["moe"]["rows"][3]
    second = measured_by(stand_ins.device_fails, "--only", "moe")
    assert cases(second["stages"]["moe"]) == stand_ins.CASES
    assert all("result" in row for row in second["stages"]["moe"]["rows"])


def test_a_stage_is_measured_again_on_request(measured_by: Any) -> None:
    measured_by(stand_ins.device_fails, "--only", "moe")
    record = measured_by(stand_ins.hangs_after_two, "--only", "moe", "--again", "moe", "--limit", "1.5")
    assert cases(record["stages"]["moe"]) == stand_ins.CASES[:2]


def test_a_record_of_another_device_or_other_kernels_is_not_gone_on_with(
    measured_by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_by(stand_ins.device_fails, "--only", "moe")
    with pytest.raises(SystemExit, match="measured on stand-in, this is another; give another --out"):
        measured_by(stand_ins.is_elsewhere, "--only", "tiles")
    monkeypatch.setattr(measure, "kernels_digest", lambda: "other")
    with pytest.raises(SystemExit, match=r"kernels \w+, wanted other, to go on; give another --out"):
        measured_by(stand_ins.device_fails, "--only", "moe")


def test_all_stages_together_fit_into_a_quarter_of_an_hour() -> None:
    assert sum(stage.seconds for stage in measure.STAGES) <= 15 * 60
