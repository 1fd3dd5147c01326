"""Training LongCat-Nano: one seed gives one set of weights, a cut-off run goes on unchanged, and the record of it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import typer
from tokenizers import Tokenizer
from torch import Tensor
from typer.testing import CliRunner

from examples.nano import measure, train
from examples.nano.settings import PRESETS, Settings, SettingsError
from examples.nano.trainer import DivergedError, ResumeError, Trainer, deterministic
from longcat_core.reference import LongcatForCausalLM
from longcat_core.weights import checkpoint

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


def test_the_balance_loss_is_a_part_of_what_the_router_learns_from() -> None:
    routers = [f"model.layers.{layer}.mlp.router.classifier.weight" for layer in range(2)]
    one, other = (trained(TINY.changed({"device_balance.coefficient": each}), 1) for each in (1e-3, 1.0))
    assert set(routers) <= set(different(one, other))


def test_drafts_after_the_first_are_learned_from_as_an_engine_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(TINY.changed({"draft_layer.deep_every": 2, "bf16": False}), 15)
    ids = stream()[:48].view(2, 24).long()
    takes_own = torch.rand(2, 23, generator=torch.Generator().manual_seed(2)) < 0.5
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.where(takes_own, 0.0, 1.0))
    with torch.no_grad():
        logits, hidden, _ = trainer.model(ids)
        assert len(trainer._draft_losses(hidden, ids, logits, 0)) == 1
        trainer.step += 1
        first, second, _ = trainer._draft_losses(hidden, ids, logits, 0)
        wanted: dict[int, list[Tensor]] = {1: [], 2: []}
        for row in range(2):
            own, past = [], None
            for place in range(23):
                place_ids = ids[row : row + 1, place + 1 : place + 2]
                drafted, made, past = trainer.model.draft(hidden[row : row + 1, place : place + 1], place_ids, past)
                own.append(made)
                wanted[1].append(F.cross_entropy(drafted[0], logits[row, place + 1 : place + 2].argmax(-1)))
            past = None
            for place in range(23):
                given = own[place - 1] if place and takes_own[row, place] else hidden[row : row + 1, place : place + 1]
                drafted, _, past = trainer.model.draft(given, ids[row : row + 1, place + 1 : place + 2], past)
                wanted[2].append(F.cross_entropy(drafted[0], logits[row, place + 1 : place + 2].argmax(-1)))
    assert float(first) == pytest.approx(float(torch.stack(wanted[1]).mean()), rel=1e-5)
    assert float(second) == pytest.approx(float(torch.stack(wanted[2]).mean()), rel=1e-5)


def test_a_layer_whose_tokens_all_go_to_zero_experts_learns_on() -> None:
    settings = TINY.changed({"model.moe_topk": 4, "zero_experts.target": 2.0})  # as many choices as zero experts
    trainer = trained(settings, 1)
    trainer.model.model.layers[0].mlp.router.e_score_correction_bias[:8] = -2.0
    assert trainer.train_step().ffn_experts[0] == 0.0
    assert trainer.train_step().ffn_experts[0] > 0.0


def test_a_run_that_diverges_is_ended() -> None:
    trainer = trained(TINY, 1)
    trainer.model.lm_head.weight.data[8] = torch.nan
    with pytest.raises(DivergedError, match="step 2: a loss of nan; lower the learning_rate"):
        trainer.train_step()
    assert trainer.step == 1


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
        ({"model.vocab_size": 200}, "greater than or equal to 264"),
        ({"draft_layer.depth": 17}, "less than or equal to 16"),
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
    assert record["sha256"] == {s.name: sha256(s.read_bytes()).hexdigest() for s in checkpoint.shards(made)}
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
    few = tmp_path / "few.json"
    long = {"sequence_length": 100_000, "model.max_position_embeddings": 100_000}
    few.write_text(TINY.changed(long).model_dump_json())
    for arguments, complaint in [
        (("--out", made), "is not an empty directory"),
        (("--out", tmp_path / "new", "--resume"), "so no run to go on with"),
        (("--out", tmp_path / "new", "--preset", "huge"), "--preset: huge, wanted cpu, gpu, tiny"),
        (("--out", tmp_path / "new", "--minutes", "1", "--steps", "5"), "wanted one of them"),
        (("--out", tmp_path / "new", "--minutes", "1"), "--minutes: 1, wanted more than 1"),
        (("--out", tmp_path / "new", "--minutes", "inf"), "--minutes: inf, wanted more than 1"),
        (("--out", tmp_path / "new", "--preset", "cpu", "--settings", made / "record.json"), "wanted one of them"),
        (("--out", tmp_path / "new", "--settings", few), "tokens held out, wanted a window, 100000"),
        (("--out", tmp_path / "new", "--device", "cudaa"), "--device: 'cudaa', wanted cpu or cuda"),
        (("--out", tmp_path / "new", "--resume", "--seed", "0"), "leave out --seed"),
        (("--out", tmp_path / "new", "--resume", "--no-pid", "--preset", "gpu"), "leave out --preset, --pid"),
    ]:
        code, output = run(*arguments, "--library", library)
        assert code == 1
        assert complaint in output.replace("\n", " ")


def test_a_run_takes_about_the_time_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps that take 1 s at half depth, 2 s at full depth, and 4 s with the draft layer."""
    clock = 0.0

    def train_step(trainer: Trainer) -> None:
        nonlocal clock
        drafts = trainer.settings.drafts_from == 0
        clock += 4.0 if drafts else float(trainer.settings.model.num_layers)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(train.time, "monotonic", lambda: clock)
    settings = TINY.changed({"growth.enabled": True, "growth.at": 0.4, "draft_layer.begins": 0.7})
    steps = train.steps_for(minutes=11.0, settings=settings, stream=stream(), device=CPU, threads=1)
    assert steps == int(600 / (0.4 * 1 + 0.3 * 2 + 0.3 * 4))
    whole = TINY.changed({"draft_layer.enabled": False})
    assert train.steps_for(minutes=11.0, settings=whole, stream=stream(), device=CPU, threads=1) == 300


def test_a_command_that_was_cut_off_goes_on_with_resume(
    made: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_PROMPTS", 2)
    step, out = Trainer.train_step, tmp_path / "again"

    def cut_off(trainer: Trainer) -> object:
        if trainer.step == 17:
            raise KeyboardInterrupt
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", cut_off)
        run("--out", out, "--preset", "tiny", "--library", library, "--threads", "1")
    assert not out.exists()
    code, output = run("--out", out, "--resume", "--library", library, "--threads", "1")
    assert code == 0, output
    for shard in checkpoint.shards(made):
        assert (out / shard.name).read_bytes() == shard.read_bytes()
    whole, resumed = (json.loads((each / "record.json").read_text()) for each in (made, out))
    for each in (whole, resumed):
        assert len(each["curves"].pop("tokens_per_second")) == 20
    assert {**resumed, "made": "", "seconds": 0} == {**whole, "made": "", "seconds": 0}


def test_a_run_that_could_not_be_measured_goes_on_with_resume(
    made: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_PROMPTS", 2)
    out, settings = tmp_path / "again", tmp_path / "settings.json"
    settings.write_text(TINY.changed({"save_every": 7}).model_dump_json())

    def fail(*arguments: object) -> object:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(train.training_record, "results", fail)
        code, output = run("--out", out, "--settings", settings, "--library", library, "--threads", "1")
        assert (code, "no space left on device" in output) == (1, True)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", fail)
        code, output = run("--out", out, "--resume", "--library", library, "--threads", "1")
    assert code == 0, output
    for shard in checkpoint.shards(made):
        assert (out / shard.name).read_bytes() == shard.read_bytes()
