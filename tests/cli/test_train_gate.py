"""`longcat train-gate`: a gate from prompts, what is said of it, what is refused, and that nothing half-made stays."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from tokenizers import Tokenizer
from typer.testing import CliRunner, Result

from longcat_cli import example_tokenizer, train_gate
from longcat_cli.commands import app
from longcat_core.drafting import gate as drafting
from longcat_core.reference import LongcatForCausalLM
from longcat_core.weights import checkpoint
from tests.cases import DEFAULT, drafting_tensors, published, write_checkpoint

PROMPTS = ["def f(x):", "The quick brown fox", "import os", "  return self", "龙猫", "a = b + c", "for i in range(3):"]
OPTIONS = ["--steps", "3", "--new-tokens", "24"]


@pytest.fixture
def directory(source: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(source, tmp_path / "model"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n  \n", encoding="utf-8")
    return path


def run(directory: Path, prompts: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["train-gate", str(directory), "--prompts", str(prompts), *OPTIONS, *options])


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_help_is_shown_without_torch() -> None:
    code = "import sys\nfrom longcat_cli import main\ntry:\n    main()\nfinally:\n    "
    code += "print({'torch', 'tokenizers', 'matplotlib'} & set(sys.modules))"
    for arguments in (["--help"], ["train-gate", "--help"]):
        result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert "train-gate" in result.stdout
        assert result.stdout.endswith("set()\n")


def test_a_gate_and_its_plot_are_written_into_the_checkpoint(directory: Path, prompts: Path) -> None:
    before = contents(directory)
    result = run(directory, prompts)
    assert result.exit_code == 0, result.output
    written = contents(directory)
    assert written.keys() - before.keys() == {"draft_gate/gate.safetensors", "draft_gate/trade_off.png"}
    assert {name: written[name] for name in before} == before
    assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []
    assert written["draft_gate/trade_off.png"].startswith(b"\x89PNG")
    assert (directory / drafting.GATE_FILE).stat().st_mode & 0o777 == 0o644
    checkpoint.verify(directory, DEFAULT)


def test_the_gate_is_trained_on_some_prompts_and_chosen_on_the_others(directory: Path, prompts: Path) -> None:
    result = run(directory, prompts, "--held-out", "0.4", "--max-loss", "0.1", "--seed", "2")
    assert result.exit_code == 0, result.output
    gate = drafting.load(directory)
    assert gate is not None

    model = LongcatForCausalLM.from_checkpoint(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    chains = []
    for text in PROMPTS:
        prompt = tokenizer.encode(text).ids
        chains.append(drafting.draft_chains(model, prompt, model.generate(prompt, 24), 3))
    trained, measured = train_gate._split(chains, 0.4, seed=2)
    assert (len(trained), len(measured)) == (4, 3)
    assert {id(each) for each in trained + measured} == {id(each) for each in chains}
    splits = [train_gate._split(chains, 0.4, seed)[1] for seed in range(5)]
    assert len({tuple(map(id, each)) for each in splits}) > 1, "the seed splits too"
    wanted = drafting.train(trained, seed=2)
    assert torch.equal(gate.hidden.weight, wanted.hidden.weight)
    chosen = drafting.choose(drafting.trade_off(wanted, measured, train_gate.THRESHOLDS), max_loss=0.1)
    assert gate.threshold == chosen.threshold
    assert chosen.threshold > 0, "the case has something to save"

    drafts = sum(each.tokens.numel() for each in chains)
    accepted = sum(float(each.labels().sum()) for each in chains) / drafts
    assert f"{drafts} drafts, {accepted:.1%} accepted" in result.stderr
    assert 0.1 < accepted < 0.95
    (row,) = (line for line in result.stdout.splitlines() if "chosen" in line)
    cells = [cell.strip() for cell in re.split("[│|]", row)]
    pruned = 1 - chosen.verified / 3
    assert cells[:4] == [
        f"{chosen.threshold:g}",
        f"{chosen.accepted_length:.3f}",
        f"{chosen.verified:.3f}",
        f"{pruned:.1%}",
    ]
    (row,) = (line for line in result.stdout.splitlines() if "no gate" in line)
    assert [cell.strip() for cell in re.split("[│|]", row)][::2] == ["0", "3.000", "no gate"]
    assert "measured on 3 answers" in result.stdout


def test_a_given_threshold_is_taken_and_shown(directory: Path, prompts: Path) -> None:
    result = run(directory, prompts, "--threshold", "0.333")
    assert result.exit_code == 0, result.output
    gate = drafting.load(directory)
    assert gate is not None
    assert gate.threshold == 0.333
    (row,) = (line for line in result.stdout.splitlines() if "chosen" in line)
    assert row.split()[0] == "0.333"


def test_a_gate_that_holds_nothing_back_is_owned_up_to(directory: Path, prompts: Path) -> None:
    result = run(directory, prompts, "--threshold", "0")
    assert result.exit_code == 0, result.output
    assert "threshold 0 lets every draft through" in result.stderr
    assert any("no gate, chosen" in line for line in result.stdout.splitlines())


def test_the_same_seed_gives_the_same_gate_in_place_of_the_one_before(directory: Path, prompts: Path) -> None:
    gates = []
    for seed in ("0", "1", "0"):
        assert run(directory, prompts, "--seed", seed).exit_code == 0
        gates.append(drafting.load(directory))
    first, other, again = (dict(gate.state_dict(), threshold=torch.tensor(gate.threshold)) for gate in gates if gate)
    assert not torch.equal(first["hidden.weight"], other["hidden.weight"])
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert sorted(path.name for path in (directory / "draft_gate").iterdir()) == ["gate.safetensors", "trade_off.png"]


def test_a_failure_half_way_leaves_the_gate_before(
    directory: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafting.save(drafting.DraftGate(0.25), directory, "the gate before")
    before = contents(directory)

    def fail(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(train_gate, "_plot", fail)
    result = run(directory, prompts, "--seed", "1")
    assert result.exit_code == 1
    assert "no space left" in result.stderr
    assert contents(directory) == before


def test_a_failure_of_the_last_rename_brings_the_gate_before_back(
    directory: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafting.save(drafting.DraftGate(0.25), directory, "the gate before")
    before, rename = contents(directory), Path.rename

    def fail(path: Path, target: Path) -> Path:
        if "unfinished" in path.parent.name and path.name == "draft_gate":
            raise OSError("disk on fire")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    assert run(directory, prompts, "--seed", "1").exit_code == 1
    assert contents(directory) == before


def test_an_answer_ends_where_engines_end_it(directory: Path) -> None:
    model = LongcatForCausalLM.from_checkpoint(directory)
    answer = model.generate([5, 6, 7], 24)
    end = answer[10]
    length = answer.index(end) + 1

    def collected(ends: set[int], steps: int = 3) -> list[drafting.Chains]:
        with Progress(disable=True) as progress:
            return train_gate._collect(model, [[5, 6, 7]], steps, 24, ends, progress)

    (whole,), (cut,) = collected(set()), collected({end})
    assert len(whole.tokens) == 24 - 3
    assert torch.equal(cut.tokens, whole.tokens[: length - 3])
    assert collected({end}, steps=length) == [], "an answer too short to judge"


def test_end_tokens_are_those_of_the_generation_config_or_else_of_the_config(tmp_path: Path) -> None:
    assert train_gate.end_tokens(tmp_path) == set()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert train_gate.end_tokens(tmp_path) == {2}
    (tmp_path / "generation_config.json").write_text(json.dumps({}))
    assert train_gate.end_tokens(tmp_path) == {2}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 0]}))
    assert train_gate.end_tokens(tmp_path) == {3, 0}


# -- refusals ------------------------------------------------------------------------------------------


def assert_refused(result: Result, complaint: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("longcat train-gate: ")
    assert len(result.stderr.splitlines()) == 1
    assert re.search(complaint, result.stderr), result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--steps", "0"], "--steps: 0, wanted at least 1"),
        (["--new-tokens", "3"], "--new-tokens: 3, wanted more than the 3 of --steps"),
        (["--new-tokens", "512"], "--new-tokens: 512, wanted less than the context of 512 tokens"),
        (["--new-tokens", "509"], r"prompts.txt, line 1: \d tokens, wanted 1 to 3, .* the context of 512"),
        (["--max-loss", "-0.1"], "--max-loss: -0.1, wanted a number from 0 to 1"),
        (["--threshold", "nan"], "--threshold: nan, wanted a number from 0 to 1"),
        (["--held-out", "2"], "--held-out: 2.0, wanted a number from 0 to 1"),
        (["--held-out", "0.9"], "63 drafts to train on, of 7 answers .* wanted at least 200"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], complaint: str, directory: Path, prompts: Path
) -> None:
    before = contents(directory)
    result = run(directory, prompts, *options)
    if "drafts to train on" in complaint:  # the progress so far stays on the screen
        assert result.exit_code == 1
        assert re.search(complaint, result.stderr.splitlines()[-1])
    else:
        assert_refused(result, complaint)
    assert contents(directory) == before


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "0 prompts, wanted at least 2"),
        (b"\n \n", "0 prompts, wanted at least 2"),
        (b"only one\n\n", "1 prompts, wanted at least 2"),
        (b"fine\n\xff\xfe\n", "not UTF-8"),
        (b"short\n\n" + b"\xe9\xbe\x99" * 400 + b"\n", r"line 3: \d+ tokens, wanted 1 to 488"),
    ],
    ids=["empty", "blank", "one", "not_utf8", "too_long"],
)
def test_prompts_that_cannot_be_used_are_refused(
    content: bytes, complaint: str, directory: Path, prompts: Path
) -> None:
    prompts.write_bytes(content)
    assert_refused(run(directory, prompts), complaint)
    assert not (directory / "draft_gate").exists()


def test_a_line_ends_at_a_newline_and_nowhere_else(directory: Path, prompts: Path) -> None:
    prompts.write_bytes("\ufeffone\u2028line\r\n\r\n \u3000\ntwo\rthree".encode())
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    found = train_gate.read_prompts(prompts, directory, DEFAULT, 24)
    assert found == [tokenizer.encode(text).ids for text in ("one\u2028line", "two\rthree")]


def test_a_prompts_file_or_a_checkpoint_that_is_not_there_is_named(directory: Path, prompts: Path) -> None:
    assert_refused(run(directory, prompts.with_name("absent.txt")), "No such file.*absent.txt")
    assert_refused(run(directory.with_name("absent"), prompts), "absent/config.json: no such file; give the directory")


def test_a_checkpoint_without_an_mtp_layer_is_refused(directory: Path, prompts: Path) -> None:
    write_checkpoint(directory, DEFAULT, published(DEFAULT, with_mtp=False))
    assert_refused(run(directory, prompts), "no MTP layer that a gate could belong to")


def test_a_missing_broken_or_foreign_tokenizer_is_refused(directory: Path, prompts: Path) -> None:
    example_tokenizer.write(directory, 1000, DEFAULT.max_position_embeddings)
    assert_refused(run(directory, prompts), r"tokenizer.json: token \d+ in .*, line \d+, wanted below .* 320")
    (directory / "tokenizer.json").write_text("{")
    assert_refused(run(directory, prompts), "tokenizer.json: not a tokenizer")
    (directory / "tokenizer.json").unlink()
    assert_refused(run(directory, prompts), "tokenizer.json: no such file")


def test_drafts_that_are_never_right_teach_nothing(directory: Path, prompts: Path) -> None:
    tensors = drafting_tensors(DEFAULT)
    tensors["model.mtp.norm.weight"] *= -1  # its likeliest token is now its least likely
    write_checkpoint(directory, DEFAULT, tensors)
    result = run(directory, prompts)
    assert result.exit_code == 1
    assert "0 of 378 drafts were accepted" in result.stderr
    assert not (directory / "draft_gate").exists()


def test_files_in_the_gates_folder_that_are_not_ours_are_refused_and_left_alone(directory: Path, prompts: Path) -> None:
    (directory / "draft_gate").mkdir()
    (directory / "draft_gate" / "thesis.txt").write_text("precious")
    before = contents(directory)
    assert_refused(run(directory, prompts), "draft_gate holds thesis.txt, which training did not write")
    assert contents(directory) == before


def test_without_matplotlib_the_extra_is_named_before_any_work(
    directory: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert_refused(run(directory, prompts), r"matplotlib.* absent; pip install 'longcat-serving\[train\]'")
