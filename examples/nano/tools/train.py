"""`python -m examples.nano.tools.train`: fine-tunes the shipped Nano to call tools in the format of Thinking-2601."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer

from examples.nano import publish, training_record
from examples.nano.settings import Settings
from examples.nano.tools import glance, tokenizer
from examples.nano.tools.conversations import Source
from examples.nano.tools.domain import tools
from examples.nano.tools.trainer import Batch, ToolTrainer, batch, batches, drawn, widened
from examples.nano.trainer import deterministic
from longcat_core.reference import LongcatForCausalLM
from longcat_nano import CHECKPOINT

SETTINGS = Settings(
    steps=3200,
    batch_size=8,
    learning_rate=1.2e-3,
    warmup_steps=20,
    decay=0.8,
    weight_decay=0.05,
    bf16=False,
    measure_every=100,
)
"""Of the shipped one."""
_GLANCED = 36
"""Held-out conversations, while training."""


def command(
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes, by and by: a new or an empty directory.")],
    base: Annotated[
        Path, typer.Option(help="What to go on from: the shipped Nano, or what was made of it.")
    ] = CHECKPOINT,
    steps: Annotated[int, typer.Option(min=2, help="Steps to train for.")] = SETTINGS.steps,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, steps and machine, same weights.")] = SETTINGS.seed,
    threads: Annotated[int, typer.Option(min=1, help="One a part of a batch, of which there are two.")] = 2,
) -> None:
    """Fine-tune the shipped Nano on conversations with tools.

    OUT has what was learned so far from the first glance at held-out ones on; its record comes at the end.
    `python -m examples.nano.tools.measure OUT` adds what it is worth.
    """
    try:
        if out.exists() and any(out.iterdir()):
            raise FileExistsError(f"{out} is not empty; name another directory, or remove it")
        out.mkdir(parents=True, exist_ok=True)
        _run(base, out, SETTINGS.changed({"steps": steps, "seed": seed}), threads)
    except (ValueError, OSError) as error:
        typer.echo(f"examples.nano.tools.train: {error}", err=True)
        raise typer.Exit(1) from None


def _run(base: Path, out: Path, settings: Settings, threads: int) -> None:
    deterministic()
    read = tokenizer.write(base, out)
    model = LongcatForCausalLM.from_checkpoint(base)
    if model.config.vocab_size < read.get_vocab_size():
        model = widened(model, read.get_vocab_size(), settings.seed, tokenizer.ids(read))
    settings = settings.changed({"model.vocab_size": read.get_vocab_size()})
    typer.echo("drawing conversations", err=True)
    trainer = ToolTrainer(settings, model, batches(read, settings), tokenizer.ids(read), threads)
    train(trainer, out, _glanced(read, settings.seed))
    publish.write_json(out / training_record.FILE, record(base, out, trainer, threads))


def train(trainer: ToolTrainer, out: Path, glanced: Sequence[Batch]) -> None:
    """Every step, with the checkpoint written whenever there is a glance at held-out conversations."""
    settings, begun, marked = trainer.settings, time.monotonic(), 0.0
    while trainer.step < settings.steps:
        measured = trainer.train_step()
        done, last = trainer.step, trainer.step == settings.steps
        trainer.seconds = time.monotonic() - begun
        if done % settings.record_every == 0 or last:
            trainer.curves.note(done, measured, 0.0)
            typer.echo(f"{done} {measured.loss:.4f} {measured.draft_loss} {trainer.seconds / done:.2f}", err=True)
        if done % settings.measure_every == 0 or last:
            trainer.write(out)
            typer.echo(
                f"step {done}/{settings.steps}: loss {measured.loss:.4f}, "
                f"held out {glance.exact(trainer.model, glanced):.1%}, "
                f"{(trainer.seconds - marked) / settings.measure_every:.2f} s a step, {trainer.seconds / 60:.1f} min",
                err=True,
            )
            marked = trainer.seconds


def record(base: Path, out: Path, trainer: ToolTrainer, threads: int) -> dict[str, Any]:
    """What `examples.nano.tools.measure` adds its results to."""
    settings, curves = trainer.settings, trainer.curves
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(trainer.seconds),
        "machine": training_record.machine(trainer.device, threads),
        "settings": settings.model_dump(),
        "from": training_record.digests(base),
        "sha256": training_record.digests(out),
        "conversations": settings.steps * settings.batch_size,
        "curves": {"step": curves.step, "loss": curves.loss, "draft_loss": curves.draft_loss},
    }


def _glanced(read: Tokenizer, seed: int) -> list[Batch]:
    source = Source(seed + 1, held_out=True)
    found = sorted(drawn(read, source, tools(), _GLANCED), key=lambda each: len(each.ids))
    return [batch(found[first : first + 16]) for first in range(0, len(found), 16)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(command)
