"""`longcat quantize`: a checkpoint in FP8, what is said of it, what is refused, and a run that was killed."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from longcat_cli import loading, quantize
from longcat_cli.commands import app
from longcat_core.recipe.conversion import PROGRESS, Source
from longcat_core.weights import checkpoint
from tests.cases import DEFAULT, published, write_checkpoint

TEXT = "def f(x):\n    return x + 1\n\n\n" * 40
DOWN = "model.layers.0.mlps.1.down_proj"
EXPERT = "model.layers.1.mlp.experts.3"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def planted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model one of whose down projections has inputs of a million, and one of whose experts is never chosen."""
    directory = Path(shutil.copytree(source, tmp_path_factory.mktemp("planted") / "model"))
    tensors = published(DEFAULT)
    tensors["model.layers.0.mlps.1.up_proj.weight"][5] *= 1e6
    tensors[f"{DOWN}.weight"][:, 5] *= 1e-6
    tensors["model.layers.1.mlp.router.e_score_correction_bias"][3] = -9.0
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    return write_checkpoint(directory, DEFAULT, tensors)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def ignored(out: Path) -> list[str]:
    config = json.loads((out / "config.json").read_text())
    found: list[str] = config["quantization_config"]["ignored_layers"]
    return found


def row(result: Result, kind: str) -> list[str]:
    """The cells of the table's row."""
    (line,) = (line for line in result.stdout.splitlines() if line.strip().startswith(kind))
    return [cell.strip() for cell in re.split("[│|]", line)][1:]


def test_the_layer_with_extreme_inputs_and_a_large_error_stays_in_bf16(
    planted: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run(planted, out, "--text", text, "--plot", tmp_path / "plot.png")
    assert result.exit_code == 0, result.output
    assert ignored(out) == [DOWN]
    checkpoint.verify(out, checkpoint.read_config(out), requires_mtp=True)
    assert not (out / PROGRESS).exists()
    count, largest, _, output_error, extreme, large, kept, _, _ = row(result, "dense FFN down_proj")
    assert (count, extreme, large, kept) == ("4", "1", "1", "1")
    assert float(largest) > 1e5
    assert float(output_error.removesuffix("%")) > 10
    assert row(result, "dense FFN up_proj")[4:7] == ["0", "1", "0"]
    assert f"kept in bf16: {DOWN}\n" in result.stdout
    (remark,) = (line for line in result.stdout.splitlines() if line.startswith("no token of the text took "))
    assert re.search(rf"took \d of 16 experts, .*: .*{re.escape(EXPERT)}\b", remark)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    layers = 2 * (2 * (5 + 3) + 3 * 8) + 9
    assert f"{layers}/{layers}" in result.stderr, "every linear layer was measured"


def test_the_lists_and_a_budget_can_be_chosen(planted: Path, text: Path, tmp_path: Path) -> None:
    found = {}
    for keep in ("union", "activation", "error"):
        assert run(planted, tmp_path / keep, "--text", text, "--keep", keep).exit_code == 0
        found[keep] = ignored(tmp_path / keep)
    assert found["activation"] == [DOWN]
    assert found["union"] == found["error"]
    assert {DOWN, DOWN.replace("down", "up"), DOWN.replace("down", "gate")} <= set(found["union"])
    assert run(planted, tmp_path / "none", "--keep", "none").exit_code == 0
    assert ignored(tmp_path / "none") == []
    assert run(planted, tmp_path / "budget", "--text", text, "--budget", "20000").exit_code == 0
    sizes = [checkpoint_bytes(tmp_path / name) for name in ("none", "budget")]
    assert 0 < sizes[1] - sizes[0] <= 20000


def checkpoint_bytes(directory: Path) -> int:
    size: int = json.loads((directory / checkpoint.INDEX_NAME).read_text())["metadata"]["total_size"]
    return size


def test_a_text_is_read_in_sequences_of_equal_length(source: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "SEQUENCE", 64)
    whole = loading.read_tokenizer(source).encode(TEXT).ids
    for count, shape in ((10, (1, 10)), (64, (1, 64)), (65, (2, 32)), (130, (3, 43))):
        found = quantize._tokens(source, text, count, Source(source))
        assert tuple(found.shape) == shape
        assert found.flatten().tolist() == whole[: shape[0] * shape[1]]


def test_thresholds_are_taken(planted: Path, text: Path, tmp_path: Path) -> None:
    options = ("--extreme-activation", "1.01", "--large-relative-error", "1.01", "--large-absolute-error", "1.01")
    assert run(planted, tmp_path / "out", "--text", text, *options).exit_code == 0
    assert len(ignored(tmp_path / "out")) > 3


def test_the_draft_layer_in_bf16_is_said_in_both_ways(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "out", "--keep", "none", "--mtp", "bf16").exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["disable_quant_module"] == ["mtp"]
    assert len(ignored(tmp_path / "out")) == 9
    assert all(name.startswith("model.mtp.layers.0.") for name in ignored(tmp_path / "out"))


def test_a_dry_run_tells_sizes_and_needs_no_text(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out").exists()
    assert run(source, tmp_path / "real", "--keep", "none").exit_code == 0
    _, before, after, _ = row(result, "all  ")
    assert after == f"{checkpoint_bytes(tmp_path / 'real') / 1000:.1f} kB"
    assert before == f"{sum(t.nbytes for t in checkpoint.load(source, DEFAULT).values()) / 1e6:.1f} MB"
    assert row(result, "experts up_proj") == ["16", "131.1 kB", "32.8 kB", "32.7 kB"], "of fp32, and bf16 if kept"


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(planted: Path, text: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(planted, whole, "--text", text).exit_code == 0
    kill_in_the_second_shard = (
        "import os, signal, sys\n"
        "import longcat_core.weights.streaming as streaming\n"
        "calls = []\n"
        "def fsync(file):\n"
        "    calls.append(file)\n"
        "    if len(calls) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "streaming.os.fsync = fsync\n"
        "from longcat_cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", kill_in_the_second_shard, "quantize", planted, out, "--text", text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(out.glob("*.safetensors"))) == 1
    assert (out / PROGRESS).exists()
    assert not (out / "config.json").exists()

    before = contents(out)
    for other in (("--keep", "union"), ("--extreme-activation", "11"), ("--mtp", "bf16"), ("--tokens", "9")):
        assert_refused(run(planted, out, "--text", text, *other), "of an unfinished run with other settings")
    assert contents(out) == before

    result = run(planted, out, "--text", text)
    assert result.exit_code == 0, result.output
    assert "calibrating" not in result.stderr, "what was measured was noted"
    assert contents(out) == contents(whole)


# -- refusals --------------------------------------------------------------------------------------------


def assert_refused(result: Result, complaint: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("longcat quantize: ")
    assert len(result.stderr.splitlines()) == 1
    assert re.search(complaint, result.stderr), result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "--text: missing; give a UTF-8 file to calibrate on, or --keep none"),
        (["--extreme-activation", "1"], "--extreme-activation: 1.0, wanted a number above 1"),
        (["--large-relative-error", "nan"], "--large-relative-error: nan, wanted a number above 1"),
        (["--large-absolute-error", "inf"], "--large-absolute-error: inf, wanted a number above 1"),
        (["--budget", "-1"], "--budget: -1, wanted bytes, 0 or more"),
        (["--budget", "1", "--keep", "union"], "--budget chooses the layers itself; leave out --keep union"),
        (["--plot", "p.png", "--keep", "none"], "--plot draws what is measured, and with --keep none nothing is"),
        (["--plot", "p.png", "--dry-run"], "--plot draws what is measured, and with --dry-run nothing is"),
        (["--plot", "p.pdf"], "--plot: p.pdf, wanted a .png file"),
        (["--plot", "absent/p.png"], "--plot: absent/p.png, wanted a .png file in a directory that exists"),
        (["--text", "absent.txt"], "No such file.*absent.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], complaint: str, source: Path, tmp_path: Path
) -> None:
    assert_refused(run(source, tmp_path / "out", *options), complaint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "complaint"), [(b"", "no tokens, wanted a text to calibrate on"), (b"\xff\xfe", "not UTF-8")]
)
def test_a_text_that_cannot_be_used_is_refused(
    content: bytes, complaint: str, source: Path, text: Path, tmp_path: Path
) -> None:
    text.write_bytes(content)
    assert_refused(run(source, tmp_path / "out", "--text", text), complaint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_directory_that_is_no_unfinished_run_is_refused_and_left_alone(
    options: tuple[str, ...], source: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    assert_refused(run(source, out, "--text", text, *options), "out exists and is no unfinished run; name another")
    for content in ("{", "[]", "{}"):
        (out / PROGRESS).write_text(content)
        assert_refused(run(source, out, "--text", text, *options), "(not JSON|not of an unfinished run).*; remove ")
    assert (out / "thesis.txt").read_text() == "precious"
    assert_refused(run(source, text, "--text", text, *options), "text.txt exists and is no unfinished run")
    for inside in (source, source / "fp8"):
        assert_refused(
            run(source, inside, "--text", text, *options), "is in the source, .*; name a directory outside it"
        )


def test_a_source_in_fp8_is_refused(source: Path, text: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "fp8", "--keep", "none").exit_code == 0
    assert_refused(run(tmp_path / "fp8", tmp_path / "out", "--text", text), "quantised already")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_refused(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert_refused(run(source, tmp_path / "out", "--text", text), r"1,000 bytes free, wanted \d+,\d+")
    assert not (tmp_path / "out").exists()


def test_a_place_where_no_directory_can_be_is_refused_before_any_work(source: Path, text: Path) -> None:
    result = run(source, text / "out", "--text", text)
    assert_refused(result, "text.txt is no directory that can be written to")


def test_inputs_that_are_not_finite_leave_nothing_behind(source: Path, text: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(source, tmp_path / "model"))
    tensors = published(DEFAULT)
    tensors[f"{DOWN}.weight"][0, 0] = torch.inf
    write_checkpoint(directory, DEFAULT, tensors)
    result = run(directory, tmp_path / "out", "--text", text)
    assert result.exit_code == 1
    assert re.search("longcat quantize: .*: inputs that are not finite", result.stderr)
    assert not (tmp_path / "out").exists()
