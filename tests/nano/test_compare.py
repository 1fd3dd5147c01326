"""Runs with a mechanism and without it: what differs, what they cost, and the files that come of them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from examples.nano import compare
from examples.nano.compare import Mechanism, flops, pair
from examples.nano.settings import PRESETS

CPU = PRESETS["cpu"]


def test_growth_is_compared_with_as_much_compute_from_scratch() -> None:
    runs = pair(CPU, Mechanism.growth)
    assert runs["with"].grows_at > 0 == runs["without"].grows_at
    assert runs["without"].steps < runs["with"].steps
    spent = [flops(settings, settings.steps) for settings in runs.values()]
    assert spent[0] == pytest.approx(spent[1], rel=1e-3)


def test_compute_of_a_step_is_six_times_the_activated_parameters_of_its_tokens() -> None:
    tokens = CPU.batch_size * CPU.sequence_length
    assert flops(CPU, 10) == 10 * 6 * CPU.model.config().activated_parameters(4.0) * tokens


@pytest.mark.parametrize("mechanism", [each for each in Mechanism if each is not Mechanism.growth])
def test_runs_differ_in_the_switch_alone(mechanism: Mechanism) -> None:
    runs = {name: settings.model_dump() for name, settings in pair(CPU, mechanism).items()}
    group, switch = compare._SWITCH[mechanism].split(".")
    assert (runs["with"][group].pop(switch), runs["without"][group].pop(switch)) == (True, False)
    assert runs["with"] == runs["without"]


def run(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command()(compare.command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--library", "absent"), "absent: 0 files to train on"),
        (("--device", "nonsense"), "--device: 'nonsense', wanted cpu or cuda"),
        (("--preset", "huge"), "--preset: huge, wanted cpu, gpu, tiny"),
        (("--out", "/dev/null/out"), "/dev/null/out"),
    ],
)
def test_what_cannot_be_compared_is_said(options: tuple[str, str], complaint: str, tmp_path: Path) -> None:
    result = run("pid", "--out", tmp_path / "out", *options)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert result.stderr.startswith("examples.nano.compare: ")
    assert complaint in result.stderr


def test_a_comparison_leaves_its_plot_and_its_curves(tmp_path: Path) -> None:
    shutil.copytree(Path(sysconfig.get_path("stdlib")) / "json", tmp_path / "library" / "json")
    shutil.copytree(Path(sysconfig.get_path("stdlib")) / "email", tmp_path / "library" / "email")
    options = ("--preset", "tiny", "--steps", "4", "--library", tmp_path / "library", "--threads", "1")
    result = run("growth", "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    runs = json.loads((tmp_path / "out" / "compare_growth.json").read_text())["runs"]
    assert [len(run["curves"]["loss"]) for run in runs.values()] == [run["settings"]["steps"] for run in runs.values()]
    assert (tmp_path / "out" / "compare_growth.png").stat().st_size > 0
