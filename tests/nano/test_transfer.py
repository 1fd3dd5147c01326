"""Hyperparameter transfer: the report's rules in numbers, and what the trainer and its comparison make of them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import math
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner, Result

from examples.nano import learning_rates
from examples.nano.learning_rates import Run, best, curves, grid, settings_of
from examples.nano.settings import PRESETS, Settings, SettingsError
from examples.nano.trainer import Trainer, initial_std
from examples.nano.transfer import Kind, kind, learning_rate_share, std_share
from longcat_core.reference import LongcatForCausalLM

TINY = PRESETS["tiny"].changed({"draft_layer.begins": 0.1})
"""Whose draft layer comes before step 2."""
WIDE = TINY.changed({"model": TINY.model.at_width(128).model_dump(), "proxy_hidden_size": 32})


@pytest.mark.parametrize(
    ("of", "std", "learning_rate"),
    [
        (Kind.embedding, 1.0, 1.0),
        (Kind.hidden, 0.353553, 0.125),
        (Kind.unembedding, 0.353553, 0.125),
        (Kind.norm, 1.0, 1.0),
    ],
)
def test_the_rules_at_the_reports_own_ratio_are_those_of_its_table(of: Kind, std: float, learning_rate: float) -> None:
    ratio = 6144 / 768
    assert std_share(of, ratio) == pytest.approx(std, abs=1e-6)
    assert learning_rate_share(of, ratio) == learning_rate


def test_every_matrix_but_embeddings_and_head_is_hidden() -> None:
    parameters = dict(LongcatForCausalLM(TINY.model.config()).named_parameters())
    found = {name: kind(name, parameter) for name, parameter in parameters.items()}
    of = {each: {name for name, its in found.items() if its is each} for each in Kind}
    assert of[Kind.embedding] == {"model.embed_tokens.weight", "model.mtp.embed_tokens.weight"}
    assert of[Kind.unembedding] == {"lm_head.weight"}
    assert {name for name in parameters if "norm" in name} == of[Kind.norm]
    for part in ("kv_b_proj", "o_proj", "gate_proj", "router.classifier", "experts.w13", "experts.w2", "eh_proj"):
        assert any(part in name for name in of[Kind.hidden]), part


def test_a_wider_model_begins_with_the_tables_share_of_the_proxys_deviations() -> None:
    proxy, wide = (dict(LongcatForCausalLM(each.model.config()).named_parameters()) for each in (TINY, WIDE))
    for name, parameter in wide.items():
        if (of := kind(name, parameter)) is not Kind.norm:
            share = initial_std(name, parameter, WIDE.width_ratio) / initial_std(name, proxy[name], 1.0)
            assert share == pytest.approx(std_share(of, 4.0)), name


def test_the_trainer_draws_weights_so_and_gives_each_kind_its_share_of_the_rate() -> None:
    trainer = Trainer(WIDE, text(), torch.device("cpu"))
    assert float(trainer.model.lm_head.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert float(trainer.model.model.embed_tokens.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    for _ in range(3):
        trainer.train_step()
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    rates = {names[each]: group["lr"] for group in trainer.optimizer.param_groups for each in group["params"]}
    now = WIDE.learning_rate * WIDE.rate(2)
    assert rates.keys() == set(names.values())
    assert rates["model.mtp.embed_tokens.weight"] == rates["model.norm.weight"] == now
    assert rates["model.layers.0.mlp.router.classifier.weight"] == rates["lm_head.weight"] == now / 4
    assert rates["model.mtp.layers.0.eh_proj.weight"] == now / 4


def test_a_model_of_the_proxys_width_is_changed_in_no_bit() -> None:
    weights = [trained(TINY), trained(TINY.changed({"proxy_hidden_size": 32}))]
    assert [name for name, weight in weights[0].items() if not torch.equal(weight, weights[1][name])] == []
    another = trained(TINY.changed({"proxy_hidden_size": 16}))
    assert not torch.equal(another["lm_head.weight"], weights[0]["lm_head.weight"])


def test_a_model_of_another_width_keeps_proportions_depth_and_experts() -> None:
    wide, nano = PRESETS["cpu"].model.at_width(768), PRESETS["cpu"].model
    grown = ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "ffn_hidden_size")
    assert [getattr(wide, name) for name in grown] == [768, 12, 288, 192, 1536]
    assert wide.expert_ffn_hidden_size == 192
    kept = ("num_layers", "n_routed_experts", "moe_topk", "qk_nope_head_dim", "v_head_dim", "vocab_size")
    assert [getattr(wide, name) for name in kept] == [getattr(nano, name) for name in kept]
    with pytest.raises(SettingsError, match=r"32, by which model\.num_attention_heads would be 0\.5"):
        nano.at_width(32)


def test_a_head_tied_to_the_embedding_has_no_rule() -> None:
    with pytest.raises(SettingsError, match=r"32 with model\.tie_word_embeddings, wanted it false"):
        TINY.changed({"proxy_hidden_size": 32, "model.tie_word_embeddings": True})


# -- the comparison ------------------------------------------------------------------------------------


def test_every_width_but_the_proxys_is_trained_with_transfer_and_without() -> None:
    runs = grid((8, 16, 32), (0.1, 0.2))
    assert [run[:2] for run in runs[::2]] == [(8, False), (16, False), (16, True), (32, False), (32, True)]
    with_it, without = (settings_of(TINY, 16, Run(32, transfer, 0.1)) for transfer in (True, False))
    assert (with_it.width_ratio, without.width_ratio, with_it.learning_rate) == (2.0, 1.0, 0.1)


def test_the_best_learning_rate_is_that_of_a_parabola() -> None:
    line = {rate: 3.0 + (math.log(rate) - math.log(0.003)) ** 2 for rate in (0.008, 0.001, 0.002, 0.004)}
    assert best(line) == pytest.approx(0.003)
    assert best({0.001: 1.0, 0.002: 2.0, 0.004: 3.0}) == 0.001


def test_runs_that_diverged_are_left_out_of_the_curves() -> None:
    losses = {Run(8, False, 0.1): 2.0, Run(8, False, 0.2): None}
    assert curves(losses) == {(8, False): {0.1: 2.0}}


def run(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command()(learning_rates.command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_width_that_cannot_be_is_said(tmp_path: Path) -> None:
    result = run("--out", tmp_path / "out", "--width", "32", "128", "256")
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert result.stderr.startswith("examples.nano.learning_rates: hidden_size: 32")


def test_a_comparison_leaves_its_plot_and_its_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_rates, "LEARNING_RATES", [0.001, 1e30])
    for package in ("json", "email"):
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / package, tmp_path / "library" / package)
    options = ("--preset", "tiny", "--steps", "2", "--library", tmp_path / "library", "--threads", "1")
    result = run("--out", tmp_path / "out", "--width", "16", "32", "64", *options)
    assert result.exit_code == 0, result.output
    runs = json.loads((tmp_path / "out" / "learning_rates.json").read_text())["runs"]
    assert [(each["width"], each["transfer"]) for each in runs[::2]] == [run[:2] for run in grid((16, 32, 64), (0.1,))]
    assert all(0 < each["held_out_loss"] < 8 for each in runs[::2])
    assert (tmp_path / "out" / "learning_rates.png").stat().st_size > 0


def text() -> Tensor:
    return torch.randint(8, 320, (2000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


def trained(settings: Settings) -> dict[str, Tensor]:
    """The weights after three steps."""
    trainer = Trainer(settings, text(), torch.device("cpu"))
    for _ in range(3):
        trainer.train_step()
    return trainer.model.state_dict()
