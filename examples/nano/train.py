"""`python -m examples.nano.train`: trains LongCat-Nano, a small LongCat-Flash that has learned something."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor

from examples.nano import measure, plots, publish, training_record
from examples.nano.corpus import standard_library
from examples.nano.corpus import streams as encoded
from examples.nano.curves import Curves, Measured
from examples.nano.settings import PRESETS, Settings, SettingsError
from examples.nano.trainer import Trainer, deterministic
from longcat_cli import example_tokenizer
from longcat_core.reference import LongcatForCausalLM

STATE = "state.safetensors"
_GLANCE_WINDOWS = 16
_MEASURING_SECONDS = 60.0
"""The part of a time budget that is reserved for what comes after the last step."""
_TIMED_STEPS = 4

console = Console(stderr=True, highlight=False)


def command(
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes: a new or an empty directory.")],
    preset: Annotated[
        str | None, typer.Option(help=f"Settings to begin with: {', '.join(PRESETS)}; cpu, if not given.")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="Settings to begin with, as JSON; a training record has them too.")
    ] = None,
    library: Annotated[
        Path | None, typer.Option(help="Python sources to train on; this Python's standard library, if not given.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that was to write to OUT.")] = False,
    minutes: Annotated[float | None, typer.Option(help="Time to train for; the steps are timed first.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps to train for.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, settings and machine, same weights.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads on a CPU, one a part of a batch; as many as cores, if not given.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one, if not given.")] = None,
    proxy_hidden_size: Annotated[
        int | None,
        typer.Option(help="Hidden size that the learning rate was found at; this model's, if not given."),
    ] = None,
    pid: Annotated[bool | None, typer.Option(help="Hold the mean of FFN experts a token at its target.")] = None,
    bias_balance: Annotated[bool | None, typer.Option(help="Balance FFN experts by their bias.")] = None,
    device_balance: Annotated[bool | None, typer.Option(help="The balance loss over devices.")] = None,
    mtp: Annotated[bool | None, typer.Option(help="The draft layer (MTP), added late.")] = None,
    growth: Annotated[bool | None, typer.Option(help="Half the depth first, then stacked.")] = None,
) -> None:
    """Train LongCat-Nano on the Python standard library, and write it as LongCat-Flash-Chat is published.

    A run that was interrupted goes on with --resume, from the state beside OUT, to the same weights.
    """
    switches = {
        "zero_experts.controlled": pid,
        "bias_balance.enabled": bias_balance,
        "device_balance.enabled": device_balance,
        "draft_layer.enabled": mtp,
        "growth.enabled": growth,
    }
    overrides = {"steps": steps, "seed": seed, "proxy_hidden_size": proxy_hidden_size} | switches
    threads = threads or os.cpu_count() or 1
    try:
        chosen = chosen_device(device)
        work = out.absolute().with_name(f".{out.name}.training")
        if resume:
            options = {"preset": preset, "settings": settings, "minutes": minutes, "steps": steps, "seed": seed}
            options |= {"pid": pid, "bias-balance": bias_balance, "device-balance": device_balance}
            options |= {"mtp": mtp, "growth": growth, "proxy-hidden-size": proxy_hidden_size}
            if given := [f"--{name}" for name, value in options.items() if value is not None]:
                raise SettingsError(f"--resume goes on with the run's own settings; leave out {', '.join(given)}")
            run(out.absolute(), work, None, None, chosen, threads, library)
        else:
            if minutes is not None and steps is not None:
                raise SettingsError(f"--minutes {minutes:g} and --steps {steps}: wanted one of them")
            if minutes is not None and not 1 < minutes < math.inf:
                raise SettingsError(f"--minutes: {minutes:g}, wanted more than 1, which measuring takes")
            if preset is not None and settings is not None:
                raise SettingsError(f"--preset {preset} and --settings {settings}: wanted one of them")
            begin = Settings.read(settings) if settings is not None else preset_of(preset or "cpu")
            run(out.absolute(), work, begin.changed(overrides), minutes, chosen, threads, library)
    except (ValueError, SafetensorError, OSError) as error:
        console.print(f"examples.nano.train: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def run(
    out: Path,
    work: Path,
    settings: Settings | None,
    minutes: float | None,
    device: torch.device,
    threads: int,
    library: Path | None,
) -> None:
    """Train, and write `out`, which appears whole or not at all; `work` has what a cut-off run goes on from.

    settings: None to go on with what is in `work`.

    Raises:
        FileExistsError: if there is something in `out`, or in `work` though there are settings.
        FileNotFoundError: if there is nothing in `work` to go on from.
        ValueError: if settings, corpus and what is in `work` do not fit together, or the training diverges.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty directory; name another one, or remove it")
    deterministic()
    resumes = settings is None
    if (work / STATE).exists() and not resumes:
        raise FileExistsError(f"{work} has a run that was cut off; go on with --resume, or remove it")
    if settings is None:
        if not (work / STATE).exists():
            raise FileNotFoundError(f"{work / STATE}: no such file, so no run to go on with; leave out --resume")
        settings = Trainer.settings_of(work / STATE)
    with console.status("reading the corpus") as status:
        corpus = standard_library(settings.held_out, library)
        status.update("training the tokenizer, and encoding")
        work.mkdir(parents=True, exist_ok=True)
        streams = encoded(corpus, work, settings)
        require_enough(streams.held_out, settings)
        if minutes is not None and not resumes:
            status.update("timing steps")
            settings = settings.changed({"steps": steps_for(minutes, settings, streams.train, device, threads)})
        if resumes:
            trainer = Trainer.resumed(work / STATE, streams.train, device, threads)
        else:
            trainer = Trainer(settings, streams.train, device, threads)
    seconds = train(trainer, streams.held_out, work / STATE)

    unfinished = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
    try:
        with console.status("measuring on held-out files"):
            publish.write(trainer.model, unfinished)
            for name in example_tokenizer.FILES:
                shutil.copyfile(work / name, unfinished / name)
            # What is measured is what is shipped: the bf16 weights.
            shipped = LongcatForCausalLM.from_checkpoint(unfinished)
            tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
            results = training_record.results(shipped, tokenizer, corpus, streams.held_out, settings)
            made = training_record.record(
                settings,
                corpus,
                len(streams.train),
                shipped,
                unfinished,
                training_record.machine(device, threads),
                seconds,
                trainer.curves,
                results,
            )
            publish.write_json(unfinished / training_record.FILE, made)
            plots.draw(made, unfinished)
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(work)
    Console().print(_table(made), "", _classes(made))
    typer.echo(f"{out}: {made['parameters'] / 1e6:.1f} M parameters; try `vllm serve {out}`")


def train(trainer: Trainer, held_out: Tensor, state: Path | None) -> float:
    """Every step that is left. The state is saved to a file, if one is given, now and then.

    Returns the seconds of training, with those of the run before it was cut off.
    """
    settings, curves = trainer.settings, trainer.curves
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[found]}"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, speed_estimate_period=600) as progress:
        task = progress.add_task("steps", total=settings.steps, completed=trainer.step, found="")
        marked, before = trainer.step, time.monotonic()
        while trainer.step < settings.steps:
            measured = trainer.train_step()
            done, last = trainer.step, trainer.step == settings.steps
            if done % settings.record_every == 0 or last:
                now = time.monotonic()
                speed = (done - marked) * settings.batch_size * settings.sequence_length / (now - before)
                trainer.seconds += now - before
                marked, before = done, now
                curves.note(done, measured, speed)
                progress.update(task, found=_found(measured, curves))
            rested = time.monotonic()
            if done % settings.measure_every == 0 or last:
                glance = measure.glance(
                    trainer.model, held_out, settings.sequence_length, _GLANCE_WINDOWS, settings.bf16
                )
                curves.note_glance(done, glance.loss, glance.drafts)
                if not console.is_terminal:  # a log shows no bar
                    now_held = f"held out {glance.loss:.3f}, {trainer.seconds / 60:.1f} min"
                    console.print(
                        f"step {done}/{settings.steps}: {_found(measured, curves)}, {now_held}", soft_wrap=True
                    )
            progress.update(task, completed=done)
            if state is not None and (done % settings.save_every == 0 or last):
                trainer.save(state)
            before += time.monotonic() - rested  # which was no training
    return trainer.seconds


def require_enough(held_out: Tensor, settings: Settings) -> None:
    """Ask for the text that measuring wants, before an hour's training rather than after it.

    held_out: int32 [tokens].

    Raises:
        ValueError: if it is too short.
    """
    if len(held_out) < settings.sequence_length:
        raise SettingsError(
            f"{len(held_out)} tokens held out, wanted a window, {settings.sequence_length}; hold out more files"
        )
    if settings.draft_layer.enabled:
        measure.prompts(held_out)


def steps_for(minutes: float, settings: Settings, stream: Tensor, device: torch.device, threads: int) -> int:
    """The steps that fit into the time, from some of each of the schedule's phases, timed on models thrown away."""
    growth, drafts = settings.growth, settings.draft_layer
    small = growth.at if growth.enabled else 0.0
    drafting = 1 - max(small, drafts.begins) if drafts.enabled else 0.0
    phases: list[tuple[float, dict[str, Any]]] = [
        (small, {"model.num_layers": settings.model.num_layers // 2, "draft_layer.enabled": False}),
        (1 - small - drafting, {"draft_layer.enabled": False}),
        (drafting, {"draft_layer.enabled": True, "draft_layer.begins": 0.0}),
    ]
    timed = max(_TIMED_STEPS, drafts.deep_every)  # a whole round of shallow and deep batches
    seconds = 0.0
    for share, changes in phases:
        if share > 0:
            trainer = Trainer(settings.changed(changes | {"growth.enabled": False}), stream, device, threads)
            trainer.train_step()  # the first is slower
            begun = time.monotonic()
            for _ in range(timed):
                trainer.train_step()
            seconds += share * (time.monotonic() - begun) / timed
    return max(1, int((60 * minutes - _MEASURING_SECONDS) / seconds))


def preset_of(name: str) -> Settings:
    """The settings of that name.

    Raises:
        SettingsError: if there are none.
    """
    if name not in PRESETS:
        raise SettingsError(f"--preset: {name}, wanted {', '.join(PRESETS)}")
    return PRESETS[name]


def chosen_device(name: str | None) -> torch.device:
    """The one of that name, or the best there is.

    Raises:
        SettingsError: if there is none.
    """
    if name not in (None, "cpu", "cuda"):
        raise SettingsError(f"--device: {name!r}, wanted cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device: 'cuda', and this torch sees no GPU; leave it out")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _found(measured: Measured, curves: Curves) -> str:
    experts = sum(measured.ffn_experts) / len(measured.ffn_experts)
    parts = [f"loss {measured.loss:.3f}", f"{experts:.2f} FFN experts"]
    parts += [f"{speed:,.0f} tokens/s" for speed in curves.tokens_per_second[-1:]]
    parts += [f"drafts {agreement:.0%}" for agreement in curves.agreement[-1:] if agreement is not None]
    return ", ".join(parts)


def _table(made: dict[str, Any]) -> Table:
    results = made["results"]
    table = Table(title="on held-out files", title_justify="left", show_edge=False, show_header=False)
    table.add_row("bits a byte", f"{results['bits_per_byte']:.3f}")
    table.add_row("  of gzip -9", f"{results['bits_per_byte_of_gzip']:.3f}")
    table.add_row("  of a byte bigram", f"{results['bits_per_byte_of_a_byte_bigram']:.3f}")
    target = made["settings"]["zero_experts"]["target"]
    table.add_row("FFN experts a token", f"{results['ffn_experts_per_token']:.3f} (target {target:g})")
    if results["drafts"] is not None:
        table.add_row("first drafts accepted", f"{results['drafts']['first']:.1%}")
        table.add_row("tokens a step", f"{results['drafts']['accepted_length']:.2f}")
    return table


def _classes(made: dict[str, Any]) -> Table:
    table = Table(title="FFN experts a token, by class of Python's", title_justify="left", show_edge=False)
    for heading in ("", "tokens", "where one is read", "where one is to come", "nats", "drafts accepted"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, each in made["results"]["classes"].items():
        read, predicted = (f"{each[key]['mean']:.2f} ± {each[key]['error']:.2f}" for key in ("read", "predicted"))
        table.add_row(
            name, f"{each['tokens']:,}", read, predicted, f"{each['nats']:.2f}", _percent(each["drafts_accepted"])
        )
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


if __name__ == "__main__":
    typer.run(command)
