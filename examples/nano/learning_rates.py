"""`python -m examples.nano.learning_rates`: the best learning rate at three widths, with hyperparameter transfer and
without it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from examples.nano import measure, publish
from examples.nano.corpus import Streams, standard_library, streams
from examples.nano.settings import PRESETS, Settings
from examples.nano.train import console, preset_of, require_enough
from examples.nano.trainer import DivergedError, Trainer, deterministic
from examples.nano.training_record import machine
from longcat_cli.plotting import BLUE, GREY, RED, figure, save

LEARNING_RATES = [1e-3 * 2**n for n in range(6)]
CPU = torch.device("cpu")
_FILE = "learning_rates"
_WINDOWS = 64
"""Of held-out text that a loss is the mean of."""


_SHORT = {
    "batch_size": 4,
    "parts": 1,
    "sequence_length": 128,
    "bf16": False,
    "draft_layer.enabled": False,
    # Few steps then learn more than which tokens are frequent.
    "model.vocab_size": 512,
}
"""What differs from the settings of a training, so that all the runs take minutes on a CPU."""


class Run(NamedTuple):
    width: int
    transfer: bool
    """At the proxy's width there is nothing to transfer, and this is False."""
    learning_rate: float


Losses = dict[Run, float | None]
"""Nats a token of held-out text; None for a run that diverged."""


def command(
    out: Annotated[Path, typer.Option(help=f"Directory for `{_FILE}.png` and `.json`.")],
    preset: Annotated[str, typer.Option(help=f"Settings of the runs: {', '.join(PRESETS)}.")] = "cpu",
    width: Annotated[tuple[int, int, int], typer.Option(help="Hidden sizes, the proxy's first.")] = (64, 128, 256),
    steps: Annotated[int, typer.Option(min=2, help="Of each run.")] = 180,
    threads: Annotated[int | None, typer.Option(min=1, help="Runs at once; as many as cores, if not given.")] = None,
    library: Annotated[Path | None, typer.Option(help="Python sources to train on, as for the training.")] = None,
) -> None:
    """Train at each width with each learning rate, by the rules of transfer and without them, and draw the losses."""
    try:
        settings = preset_of(preset).changed({"steps": steps, "warmup_steps": steps // 10} | _SHORT)
        _compare(settings, width, out, threads or os.cpu_count() or 1, library)
    except (ValueError, OSError) as error:
        console.print(f"examples.nano.learning_rates: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _compare(settings: Settings, widths: Sequence[int], out: Path, threads: int, library: Path | None) -> None:
    # Every width's settings are made before the first run, so that a width that cannot be is said at once.
    runs = {run: settings_of(settings, widths[0], run) for run in grid(widths, LEARNING_RATES)}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, console.status("reading the corpus"):
        corpus = standard_library(settings.held_out, library)
        found = streams(corpus, Path(directory), settings)
    require_enough(found.held_out, settings)
    losses: Losses = {}
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(threads, spawned, initializer=_take, initargs=(found,)) as pool:
        for run, loss in zip(runs, pool.map(_loss, runs.values()), strict=True):
            losses[run] = loss
            typer.echo(f"{run.width:5} {_arm(run.transfer):8} {run.learning_rate:.4f} {_said(loss)}")
    made = [run._asdict() | {"held_out_loss": loss} for run, loss in losses.items()]
    record = {"machine": machine(CPU, threads), "settings": settings.model_dump(), "runs": made}
    publish.write_json(out / f"{_FILE}.json", record)
    draw(losses, settings, out / f"{_FILE}.png")
    for (width, transfer), line in curves(losses).items():
        typer.echo(f"{width:5} {_arm(transfer):8} best learning rate {best(line):.4f}")


def grid(widths: Sequence[int], learning_rates: Sequence[float]) -> list[Run]:
    """Every run there is to make, the first width being the proxy's."""
    arms = [(width, transfer) for width in widths for transfer in (False, True) if width != widths[0] or not transfer]
    return [Run(width, transfer, rate) for width, transfer in arms for rate in learning_rates]


def settings_of(settings: Settings, proxy_width: int, run: Run) -> Settings:
    """Those of a run, from those that all have in common.

    Raises:
        SettingsError: if the model's sizes at that width are not whole numbers.
    """
    return settings.changed(
        {
            "model": settings.model.at_width(run.width).model_dump(),
            "learning_rate": run.learning_rate,
            "proxy_hidden_size": proxy_width if run.transfer else None,
        }
    )


_found: Streams
"""Of a process that trains."""


def _take(found: Streams) -> None:
    global _found
    _found = found
    deterministic()


def _loss(settings: Settings) -> float | None:
    trainer = Trainer(settings, _found.train, CPU)
    try:
        for _ in range(settings.steps):
            trainer.train_step()
    except DivergedError:
        return None
    glance = measure.glance(trainer.model, _found.held_out, settings.sequence_length, _WINDOWS, settings.bf16)
    return glance.loss if math.isfinite(glance.loss) else None


# -- what was found ------------------------------------------------------------------------------------


def curves(losses: Losses) -> dict[tuple[int, bool], dict[float, float]]:
    """By width and whether there was transfer: loss by learning rate, without the runs that diverged."""
    lines: dict[tuple[int, bool], dict[float, float]] = {}
    for run, loss in losses.items():
        if loss is not None:
            lines.setdefault((run.width, run.transfer), {})[run.learning_rate] = loss
    return lines


def best(line: Mapping[float, float]) -> float:
    """The learning rate of the least loss: of the parabola, over the logarithm of the rate, through the least point and
    its neighbours; the least point itself where it is at an end."""
    rates = sorted(line)
    place = rates.index(min(rates, key=lambda rate: line[rate]))
    if place in (0, len(rates) - 1):
        return rates[place]
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(rate), line[rate]) for rate in rates[place - 1 : place + 2])
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    return math.exp((x0 + x1) / 2 - left / (2 * curvature))


def draw(losses: Losses, settings: Settings, path: Path) -> Path:
    lines = curves(losses)
    title = f"Held-out loss after {settings.steps} steps, over the learning rate"
    drawn, axes = figure(title, "learning rate (the proxy's, with transfer); triangles: the best", "nats a token")
    axes.set_xscale("log")
    widths = sorted({width for width, _ in lines})
    for (width, transfer), line in lines.items():
        proxy = width == widths[0]
        colour = GREY if proxy else BLUE if transfer else RED
        label = f"{width} wide, the proxy" if proxy else f"{width} wide, {_arm(transfer)} transfer"
        shade = 1.0 if width in (widths[0], widths[-1]) else 0.5
        axes.plot(list(line), list(line.values()), ".-", color=colour, alpha=shade, label=label)
        axes.plot(best(line), 0.03, "^", color=colour, alpha=shade, transform=axes.get_xaxis_transform())
    return save(drawn, path)


def _arm(transfer: bool) -> str:
    return "with" if transfer else "without"


def _said(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


if __name__ == "__main__":
    typer.run(command)
