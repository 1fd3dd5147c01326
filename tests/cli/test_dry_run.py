"""`longcat dry-run`: what it says where there can be none, and what it prints of a report; for runs see tests/cuda."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from longcat_cli import dry_run
from longcat_cli.commands import app
from longcat_core.null_gpu import build
from tests.core.test_dry_run import REPORT


def test_without_a_cuda_build_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "_folder_of", lambda package: tmp_path)
    result = CliRunner().invoke(app, ["dry-run", "chat", "--gpus", "8xH200", "--tensor-parallel-size", "8"])
    assert result.exit_code == 2
    assert "no CUDA build in this environment" in result.output
    assert "make cuda-check" in result.output


def test_a_gpu_that_it_does_not_know_is_refused() -> None:
    result = CliRunner().invoke(app, ["dry-run", "chat", "--gpus", "8xP100"])
    assert result.exit_code == 2
    assert "wanted one of H20," in result.output


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["dry-run", str(tmp_path / "config.json"), "--gpus", "8xH200"])
    assert result.exit_code == 2
    assert "is no file" in result.output


def test_a_report_is_printed_with_choices_memory_tensors_and_launches() -> None:
    console = Console(file=io.StringIO(), width=160)
    dry_run.show(REPORT, None, console)
    printed = console.file.getvalue()
    for part in (
        "FLASH_ATTN_MLA",
        "64,512 bytes a token",
        "layers.*.weight",
        "prefill, 2048 tokens",
        "Using FLASH_ATTN",
    ):
        assert part in printed
