"""`python -m examples.nano.compare MECHANISM`: trains with a mechanism and without it, and draws what it does."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.axes import Axes

from examples.nano import publish
from examples.nano.corpus import Streams, standard_library, streams
from examples.nano.curves import Curves
from examples.nano.plots import smoothed
from examples.nano.settings import PRESETS, Settings
from examples.nano.train import chosen_device, console, preset_of, require_enough, train
from examples.nano.trainer import Trainer, deterministic
from examples.nano.training_record import machine
from longcat_cli.plotting import BLUE, GREY, RED, figure, save


class Mechanism(StrEnum):
    pid = "pid"
    bias_balance = "bias-balance"
    device_balance = "device-balance"
    mtp = "mtp"
    growth = "growth"


_SWITCH = {
    Mechanism.pid: "zero_experts.controlled",
    Mechanism.bias_balance: "bias_balance.enabled",
    Mechanism.device_balance: "device_balance.enabled",
    Mechanism.mtp: "draft_layer.enabled",
    Mechanism.growth: "growth.enabled",
}
_NOT_COMPARED = {
    # The update of the bias balances devices as well, and would hide what the loss does, and the reverse.
    Mechanism.bias_balance: {"device_balance.enabled": False},
    Mechanism.device_balance: {"bias_balance.enabled": False},
}
_WITHOUT_DRAFTS = {"draft_layer.enabled": False}


def command(
    mechanism: Annotated[Mechanism, typer.Argument(help="What to train with and without.")],
    out: Annotated[Path, typer.Option(help="Directory for `compare_MECHANISM.png` and `.json`.")],
    preset: Annotated[str, typer.Option(help=f"Settings of both runs: {', '.join(PRESETS)}.")] = "cpu",
    steps: Annotated[int, typer.Option(min=2, help="Of the run with it.")] = 600,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on a CPU, as for the training.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; a GPU if there is one, if not given, as for the training.")
    ] = None,
    library: Annotated[Path | None, typer.Option(help="Python sources to train on, as for the training.")] = None,
) -> None:
    """Train with one of the report's mechanisms and without it, and draw both."""
    threads = threads or os.cpu_count() or 1
    try:
        chosen = chosen_device(device)
        runs = pair(preset_of(preset).changed({"steps": steps}), mechanism)
        _compare(mechanism, runs, out, chosen, threads, library)
    except (ValueError, OSError) as error:
        console.print(f"examples.nano.compare: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _compare(
    mechanism: Mechanism,
    runs: dict[str, Settings],
    out: Path,
    device: torch.device,
    threads: int,
    library: Path | None,
) -> None:
    deterministic()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, console.status("reading the corpus"):
        corpus = standard_library(runs["with"].held_out, library)
        found = streams(corpus, Path(directory), runs["with"])
    for settings in runs.values():
        require_enough(found.held_out, settings)
    curves = {name: _train(settings, found, device, threads) for name, settings in runs.items()}
    file = out / f"compare_{mechanism.value.replace('-', '_')}"
    made = {
        name: {"settings": settings.model_dump(), "curves": asdict(curves[name])} for name, settings in runs.items()
    }
    publish.write_json(file.with_suffix(".json"), {"machine": machine(device, threads), "runs": made})
    draw(mechanism, runs, curves, file.with_suffix(".png"))
    for name, each in curves.items():
        typer.echo(f"{name:8} held out {each.held_out_loss[-1]:.4f} nats a token after {each.step[-1]} steps")


def pair(settings: Settings, mechanism: Mechanism) -> dict[str, Settings]:
    """The settings with the mechanism and without it: for as much compute, as `flops` estimates it, where it saves any.

    The draft layer is in neither run, unless it is the mechanism that is compared.
    """
    shared = _NOT_COMPARED.get(mechanism, {}) | ({} if mechanism is Mechanism.mtp else _WITHOUT_DRAFTS)
    with_it = settings.changed(shared | {_SWITCH[mechanism]: True})
    without = settings.changed(shared | {_SWITCH[mechanism]: False})
    if mechanism is Mechanism.growth:
        steps = round(flops(with_it, with_it.steps) / flops(without, 1))
        without = without.changed({"steps": steps})
    return {"with": with_it, "without": without}


def flops(settings: Settings, step: int) -> float:
    """Of the first `step` steps: 6 for each activated parameter and token, the draft layer and attention's products
    with the context not counted."""
    tokens, target = settings.batch_size * settings.sequence_length, settings.zero_experts.target
    small = min(step, settings.grows_at)
    half, full = (
        6 * settings.model.config(layers).activated_parameters(target) * tokens
        for layers in (max(1, settings.model.num_layers // 2), settings.model.num_layers)
    )
    return small * half + (step - small) * full


def draw(mechanism: Mechanism, runs: dict[str, Settings], curves: dict[str, Curves], path: Path) -> Path:
    titles = {
        Mechanism.pid: ("What the PID controller does", "step", "mean FFN experts a token"),
        Mechanism.bias_balance: ("What the update of the bias does", "step", "busiest FFN expert over the mean"),
        Mechanism.device_balance: ("What the balance loss does", "step", "busiest device over the mean"),
        Mechanism.mtp: ("What the draft layer costs the model", "step", "nats a token"),
        Mechanism.growth: ("Growth beside training from scratch", "training compute (PFLOP)", "nats a token"),
    }
    drawn, axes = figure(*titles[mechanism])
    for (name, settings), colour in zip(runs.items(), (BLUE, RED), strict=True):
        each = curves[name]
        if mechanism in (Mechanism.mtp, Mechanism.growth):
            _plot_loss(axes, mechanism, name, settings, each, colour)
            continue
        values = {
            Mechanism.pid: [sum(layers) / len(layers) for layers in each.ffn_experts],
            Mechanism.bias_balance: [max(layers) for layers in each.imbalance],
            Mechanism.device_balance: [max(layers) for layers in each.device_imbalance],
        }[mechanism]
        axes.plot(each.step, values, color=colour, alpha=0.25, lw=0.8)
        axes.plot(each.step, smoothed(values), color=colour, label=f"{name} it")
    if mechanism is Mechanism.pid:
        axes.axhline(runs["with"].zero_experts.target, color=GREY, lw=1, ls="--", label="target")
    return save(drawn, path)


def _plot_loss(axes: Axes, mechanism: Mechanism, name: str, settings: Settings, curves: Curves, colour: str) -> None:
    """Held-out loss as a line with points, the loss of what was trained on faint behind it."""

    def place(steps: list[int]) -> list[float]:
        return [flops(settings, step) / 1e15 if mechanism is Mechanism.growth else step for step in steps]

    axes.plot(place(curves.step), smoothed(curves.loss), color=colour, alpha=0.3, lw=0.8)
    label = f"{name} it, held out: {curves.held_out_loss[-1]:.3f} at last"
    axes.plot(place(curves.glanced), curves.held_out_loss, ".-", color=colour, label=label)
    if mechanism is Mechanism.growth and settings.grows_at:
        axes.axvline(place([settings.grows_at])[0], color=GREY, lw=0.8, ls=":", label="grows")


def _train(settings: Settings, found: Streams, device: torch.device, threads: int) -> Curves:
    trainer = Trainer(settings, found.train, device, threads)
    train(trainer, found.held_out, None)
    return trainer.curves


if __name__ == "__main__":
    typer.run(command)
