"""Training LongCat-Nano: one seed gives one set of weights, a cut-off run goes on unchanged, and the record of it."""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from tokenizers import Tokenizer
from torch import Tensor
from typer.testing import CliRunner

from examples.nano import measure, train
from examples.nano.settings import PRESETS, Settings, SettingsError
from examples.nano.trainer import ResumeError, Trainer, deterministic
from longcat_core import checkpoint
from longcat_core.reference import LongcatForCausalLM

TINY = PRESETS["tiny"]
GROWING = TINY.changed({"growth.enabled": True, "growth.at": 0.3})
"""20 steps with everything: growth before step 6, the draft layer before step 14."""
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _deterministic() -> Iterator[None]:
    deterministic()
    yield
    torch.use_deterministic_algorithms(False)


def stream() -> Tensor:
    """Every token is the next one of a circle of 40, but for one in five, which is any."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(8, 320, (6000,), generator=generator, dtype=torch.int32)
    places = torch.arange(6000, dtype=torch.int32)
    return torch.where(torch.rand(6000, generator=generator) < 0.2, tokens, 8 + places % 40)


def trained(settings: Settings, steps: int) -> Trainer:
    trainer = Trainer(settings, stream(), CPU)
    for _ in range(steps):
        trainer.train_step()
    return trainer


def everything(trainer: Trainer) -> dict[str, Tensor]:
    return dict(trainer.model.state_dict()) | trainer.optimizer_tensors() | dict(trainer.controller.state_dict())


def different(one: Trainer, other: Trainer) -> list[str]:
    ours, theirs = everything(one), everything(other)
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_two_runs_with_one_seed_give_equal_weights_bit_by_bit() -> None:
    one, other = trained(GROWING, 20), trained(GROWING, 20)
    assert different(one, other) == []
    assert one.model.model.mtp is not None
    assert one.model.config.num_layers == 2
    another_seed = trained(GROWING.changed({"seed": 1}), 1)
    assert "model.embed_tokens.weight" in different(trained(GROWING, 1), another_seed)


def test_how_many_threads_there_are_changes_no_bit() -> None:
    two_threads = Trainer(GROWING, stream(), CPU, threads=2)
    for _ in range(20):
        two_threads.train_step()
    assert different(trained(GROWING, 20), two_threads) == []


@pytest.mark.parametrize("cut", [3, 6, 14, 17])
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(cut: int, tmp_path: Path) -> None:
    whole = trained(GROWING, 20)
    trained(GROWING, cut).save(tmp_path / "state.safetensors")
    resumed = Trainer.resumed(tmp_path / "state.safetensors", stream(), CPU)
    assert (resumed.step, resumed.settings) == (cut, GROWING)
    for _ in range(20 - cut):
        resumed.train_step()
    assert different(whole, resumed) == []


def test_a_run_goes_on_with_its_own_text_alone(tmp_path: Path) -> None:
    trained(TINY, 2).save(tmp_path / "state.safetensors")
    with pytest.raises(ResumeError, match=r"another text.* the same --library and Python"):
        Trainer.resumed(tmp_path / "state.safetensors", stream().flip(0), CPU)


def test_a_state_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"nothing")
    with pytest.raises(ResumeError, match="not safetensors"):
        Trainer.resumed(tmp_path / "state.safetensors", stream(), CPU)


def test_training_learns_the_text_and_drafts_what_the_model_would_say() -> None:
    changes = {"steps": 100, "learning_rate": 1e-2, "draft_layer.begins": 0.3}
    trainer = Trainer(TINY.changed(changes), stream(), CPU)
    measured = [trainer.train_step() for _ in range(100)]
    assert measured[-1].loss < measured[0].loss - 1.0
    # One token in five is any of 312: nobody guesses the text at less than 1.65 nats a token.
    assert measured[-1].draft_loss is not None
    assert measured[-1].draft_loss < 1.0


def test_the_draft_layer_comes_late_and_every_parameter_then_learns() -> None:
    assert TINY.drafts_from == GROWING.drafts_from == 14
    trainer = trained(TINY, 14)
    assert trainer.model.model.mtp is None
    before = trained(TINY, 14)
    before._add_draft_layer()
    trainer.train_step()
    weights = before.model.state_dict()
    assert "model.mtp.layers.0.eh_proj.weight" in weights
    assert [n for n, p in trainer.model.named_parameters() if torch.equal(weights[n], p)] == []


def test_a_switch_that_is_off_leaves_its_mechanism_out() -> None:
    off = {"zero_experts.controlled": False, "bias_balance.enabled": False, "device_balance.enabled": False}
    trainer = Trainer(TINY.changed(off | {"draft_layer.enabled": False}), stream(), CPU)
    measured = [trainer.train_step() for _ in range(20)][-1]
    assert (measured.balance_loss, measured.draft_loss) == (None, None)
    assert not any(bias.any() for name, bias in trainer.model.state_dict().items() if name.endswith("correction_bias"))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"zero_experts.target": 6.0}, "6 FFN experts a token, wanted between 2 and 6"),
        ({"zero_experts.target": 6.0, "zero_experts.controlled": False}, "6 FFN experts a token, wanted between 2 and"),
        ({"model.zero_expert_num": 0}, "without zero experts, wanted zero_experts.controlled false"),
        ({"growth.enabled": True, "growth.at": 1.0}, "1 of 20 steps, wanted some after it"),
        ({"device_balance.devices": 3, "device_balance.enabled": False}, "3, wanted a divisor of the 8 FFN experts"),
        ({"device_balance.devices": 3}, "3, wanted a divisor of the 8 FFN experts"),
        ({"growth.enabled": True, "model.num_layers": 3}, "3, wanted an even number"),
        ({"parts": 3}, "3, wanted a divisor of the batch of 2"),
        ({"sequence_length": 4096}, "4096, wanted at most"),
        ({"steps": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_run_are_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        TINY.changed(changes)


# -- the command ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small standard library."""
    root = tmp_path_factory.mktemp("library")
    for package in ("json", "email", "html"):
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / package, root / package)
    return root


def run(*arguments: str | Path) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(train.command)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def made(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nano") / "checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_PROMPTS", 2)
        code, output = run("--out", out, "--preset", "tiny", "--library", library, "--threads", "1")
    assert code == 0, output
    return out


def test_the_checkpoint_is_published_as_longcats_are(made: Path) -> None:
    config = checkpoint.read_config(made)
    checkpoint.verify(made, config, requires_mtp=True)
    tensors = checkpoint.load(made, config)
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.mlp.router.classifier.weight"].dtype == torch.float32
    assert tensors["model.layers.0.mlp.router.e_score_correction_bias"].any()
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    assert tokenizer.get_vocab_size() <= config.vocab_size
    assert tokenizer.token_to_id("</longcat_s>") == json.loads((made / "config.json").read_text())["eos_token_id"]
    prompt = tokenizer.encode("def main():").ids
    assert len(LongcatForCausalLM.from_checkpoint(made).generate(prompt, 4)) == 4
    assert sorted(path.name for path in made.parent.iterdir()) == [made.name]


def test_the_record_has_settings_machine_curves_and_results(made: Path) -> None:
    record = json.loads((made / "record.json").read_text())
    assert Settings.read(made / "record.json") == TINY
    assert record["settings"]["steps"] == record["curves"]["step"][-1] == 20
    assert record["machine"]["torch"] == torch.__version__
    results = record["results"]
    assert 0 < results["bits_per_byte"] < 8
    assert results["drafts"]["chains"] > 0
    assert results["bits_per_byte_of_gzip"] < results["bits_per_byte_of_a_byte_bigram"] < 8
    plots = {"loss.png", "experts.png", "balance.png", "drafts.png", "bits_per_byte.png"}
    assert plots <= {path.name for path in made.iterdir()}


def test_the_records_settings_make_the_same_checkpoint(made: Path, library: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_PROMPTS", 1)
        arguments = ("--settings", made / "record.json", "--library", library, "--threads", "1")
        assert run("--out", tmp_path / "again", *arguments)[0] == 0
    for shard in checkpoint.shards(made):
        assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()


def test_what_cannot_be_done_is_said(made: Path, library: Path, tmp_path: Path) -> None:
    for arguments, complaint in [
        (("--out", made), "is not an empty directory"),
        (("--out", tmp_path / "new", "--resume"), "so no run to go on with"),
        (("--out", tmp_path / "new", "--preset", "huge"), "--preset: huge, wanted cpu, gpu, tiny"),
        (("--out", tmp_path / "new", "--minutes", "1", "--steps", "5"), "wanted one of them"),
        (("--out", tmp_path / "new", "--minutes", "1"), "--minutes: 1, wanted more than 1"),
        (("--out", tmp_path / "new", "--device", "cudaa"), "--device: 'cudaa', wanted cpu or cuda"),
        (("--out", tmp_path / "new", "--resume", "--seed", "0"), "leave out --seed"),
        (("--out", tmp_path / "new", "--resume", "--no-pid", "--preset", "gpu"), "leave out --preset, --pid"),
    ]:
        code, output = run(*arguments, "--library", library)
        assert code == 1
        assert complaint in output.replace("\n", " ")


def test_a_run_takes_about_the_time_it_is_given() -> None:
    settings = TINY.changed({"growth.enabled": True})
    steps = train.steps_for(minutes=2.0, settings=settings, stream=stream(), device=CPU, threads=1)
    assert 100 < steps < 60_000
