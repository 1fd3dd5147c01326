"""`longcat train-gate`: teach a checkpoint which drafts of its MTP layer are worth verifying (C2T)."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from longcat_cli import loading
from longcat_cli.loading import LoadingError
from longcat_core.config import ConfigError, LongcatConfig

if TYPE_CHECKING:
    from longcat_core.drafting.gate import Chains, DraftGate, TradeOff
    from longcat_core.reference import LongcatForCausalLM

THRESHOLDS = tuple(percent / 100 for percent in range(1, 100))
"""Those that are tried."""
_SHOWN = 5
"""The table shows the chosen threshold, and one every so many percent."""
MIN_DRAFTS = 200
"""Fewer do not settle the 241 weights of a gate, whatever the prompts."""
PLOT = "trade_off.png"


class TrainingError(ValueError):
    """What was given does not make a gate; the message says what is wanted."""


def command(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Directory of a checkpoint with its draft layer (MTP).")
    ],
    prompts: Annotated[
        Path, typer.Option(help="Text, one prompt a line, as the model is to see them, chat template and all.")
    ],
    steps: Annotated[int, typer.Option(help="Drafts a chain; as many as the engine will be told to make.")] = 4,
    new_tokens: Annotated[int, typer.Option(help="Tokens to continue each prompt by.")] = 128,
    max_loss: Annotated[float, typer.Option(help="Share of the accepted length that may be given up.")] = 0.02,
    threshold: Annotated[float | None, typer.Option(help="Take this one, rather than choose.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, prompts and checkpoint, same gate.")] = 0,
    held_out: Annotated[float, typer.Option(help="Share of the prompts to measure on, not to train on.")] = 0.2,
) -> None:
    """Train the gate that prunes drafts not worth verifying, and write it into the checkpoint.

    The model, in plain PyTorch, continues every prompt greedily, and drafts at every token; a small classifier learns
    which drafts were right (C2T, arXiv 2502.13652). Serving then verifies fewer drafts for nearly the same speed-up.
    """
    errors = Console(stderr=True, highlight=False)
    with errors.status("importing torch"):
        from longcat_core.weights.audit import CheckpointError
    try:
        _check(steps, new_tokens, {"--max-loss": max_loss, "--threshold": threshold, "--held-out": held_out})
        _train_gate(checkpoint, prompts, steps, new_tokens, max_loss, threshold, seed, held_out, errors)
    except (ConfigError, CheckpointError, LoadingError, TrainingError, OSError) as error:
        errors.print(f"longcat train-gate: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _check(steps: int, new_tokens: int, shares: dict[str, float | None]) -> None:
    if steps < 1:
        raise TrainingError(f"--steps: {steps}, wanted at least 1")
    if new_tokens <= steps:
        raise TrainingError(f"--new-tokens: {new_tokens}, wanted more than the {steps} of --steps")
    for option, share in shares.items():
        if share is not None and not 0 <= share <= 1:
            raise TrainingError(f"{option}: {share}, wanted a number from 0 to 1")
    if importlib.util.find_spec("matplotlib") is None:
        raise TrainingError("matplotlib, which draws the trade-off, is absent; pip install 'longcat-serving[train]'")


def _train_gate(
    directory: Path,
    prompts_file: Path,
    steps: int,
    new_tokens: int,
    max_loss: float,
    threshold: float | None,
    seed: int,
    held_out: float,
    console: Console,
) -> None:
    from longcat_core.drafting import gate as drafting
    from longcat_core.reference import LongcatForCausalLM
    from longcat_core.weights import checkpoint

    config = checkpoint.read_config(directory)
    model_id = drafting.fingerprint(directory, config)
    prompts = read_prompts(prompts_file, directory, config, new_tokens)
    _check_folder(directory / drafting.GATE_FILE.parent)
    loading.require_memory(directory, config)
    with console.status("loading the checkpoint"):
        model = LongcatForCausalLM.from_checkpoint(directory)

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[found]}"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
        chains = _collect(model, prompts, steps, new_tokens, end_tokens(directory), progress)
        trained, measured = _split(chains, held_out, seed)
        task = progress.add_task("epochs", total=drafting.EPOCHS, found="")

        def report(epoch: int, loss: float) -> None:
            progress.update(task, completed=epoch, found=f"loss {loss:.4f}")

        try:
            gate = drafting.train(trained, seed, report)
        except ValueError as error:
            raise TrainingError(str(error)) from None

    trade_offs = drafting.trade_off(gate, measured, sorted({*THRESHOLDS, *([] if threshold is None else [threshold])}))
    chosen = drafting.choose(trade_offs, max_loss)
    if threshold is not None:
        chosen = next(each for each in trade_offs if each.threshold == threshold)
    gate.threshold = chosen.threshold
    _write(gate, directory, model_id, trade_offs, chosen)

    Console(width=None if Console().is_terminal else 160).print(_table(trade_offs, chosen, len(measured)))
    if chosen.threshold == 0:
        console.print("a gate with threshold 0 lets every draft through; allow a larger --max-loss", style="yellow")
    typer.echo(f"{directory / drafting.GATE_FILE}: threshold {chosen.threshold:g}; the trade-off is {PLOT} beside it")


def read_prompts(file: Path, directory: Path, config: LongcatConfig, new_tokens: int) -> list[list[int]]:
    """The prompts of a UTF-8 file, one a line, blank lines skipped, in tokens of the checkpoint's `tokenizer.json`.

    Raises:
        OSError: if the file cannot be read.
        LoadingError: if it is not text, or the checkpoint's tokenizer is missing or another's.
        TrainingError: if it has fewer than 2 prompts, or one that is too long.
    """
    lines = loading.read_text(file).split("\n")
    tokenizer = loading.read_tokenizer(directory)
    prompts, longest = [], config.max_position_embeddings - new_tokens
    if longest < 1:
        raise TrainingError(
            f"--new-tokens: {new_tokens}, wanted less than the context of {config.max_position_embeddings} tokens"
        )
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt: list[int] = tokenizer.encode(line.removesuffix("\r")).ids
        if not 0 < len(prompt) <= longest:
            raise TrainingError(
                f"{file}, line {number}: {len(prompt)} tokens, wanted 1 to {longest}, which with {new_tokens} new ones "
                f"is the context of {config.max_position_embeddings}; shorten the line, or lower --new-tokens"
            )
        loading.require_in_vocabulary(prompt, directory, config, f"{file}, line {number}")
        prompts.append(prompt)
    if len(prompts) < 2:
        raise TrainingError(f"{file}: {len(prompts)} prompts, wanted at least 2: some to train on, some to measure on")
    return prompts


def end_tokens(directory: Path) -> set[int]:
    """The tokens that end an answer, as `generation_config.json` or else `config.json` name them.

    Raises:
        TrainingError: if either is not JSON.
    """
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise TrainingError(f"{path}: not JSON ({error}); download it again") from None
        if not isinstance(content, dict):
            raise TrainingError(f"{path}: {type(content).__name__}, wanted a JSON object; download it again")
        found = content.get("eos_token_id")
        if found is not None:
            return set(found) if isinstance(found, list) else {found}
    return set()


def _collect(
    model: LongcatForCausalLM,
    prompts: list[list[int]],
    steps: int,
    new_tokens: int,
    ends: set[int],
    progress: Progress,
) -> list[Chains]:
    """Chains of drafts along the greedy answer to each prompt, without answers too short to judge one."""
    from longcat_core.drafting import gate as drafting

    task: TaskID = progress.add_task("prompts", total=len(prompts), found="")
    chains: list[Chains] = []
    drafts, accepted = 0, 0.0
    for prompt in prompts:
        answer = model.generate(prompt, new_tokens)
        # Engines stop at the end of an answer; what the model would say after it is nothing to learn from.
        end = next((n + 1 for n, token in enumerate(answer) if token in ends), new_tokens)
        if end > steps:
            chains.append(drafting.draft_chains(model, prompt, answer[:end], steps))
            drafts += chains[-1].tokens.numel()
            accepted += float(chains[-1].labels().sum())
        found = f"{drafts:,} drafts, {accepted / drafts:.1%} accepted" if drafts else ""
        progress.update(task, advance=1, found=found)
    return chains


def _split(chains: list[Chains], held_out: float, seed: int) -> tuple[list[Chains], list[Chains]]:
    """What to train on and what to measure on, both of whole answers, so that neither has seen the other's text."""
    shuffled = random.Random(seed).sample(chains, len(chains))
    measured = min(max(round(held_out * len(chains)), 1), len(chains) - 1)
    trained = shuffled[measured:]
    drafts = sum(each.tokens.numel() for each in trained)
    if len(chains) < 2 or drafts < MIN_DRAFTS:
        raise TrainingError(
            f"{drafts} drafts to train on, of {len(chains)} answers longer than --steps; wanted at least {MIN_DRAFTS} "
            "of at least 2; give more prompts, or raise --new-tokens"
        )
    return trained, shuffled[:measured]


def _check_folder(folder: Path) -> None:
    """A gate replaces the gate before it, and nothing else."""
    from longcat_core.drafting.gate import GATE_FILE

    foreign = sorted({path.name for path in folder.iterdir()} - {GATE_FILE.name, PLOT}) if folder.exists() else []
    if foreign:
        raise TrainingError(f"{folder} holds {', '.join(foreign)}, which training did not write; move it elsewhere")


def _write(gate: DraftGate, directory: Path, model_id: str, trade_offs: Sequence[TradeOff], chosen: TradeOff) -> None:
    """The folder of the gate appears whole or not at all; the one before it stays until then."""
    from longcat_core.drafting import gate as drafting

    folder = directory / drafting.GATE_FILE.parent
    unfinished = directory / f".{folder.name}.unfinished-{os.getpid()}"
    before = unfinished / "before"
    try:
        drafting.save(gate, unfinished, model_id)
        _plot(trade_offs, chosen, unfinished / folder.name / PLOT)
        if folder.exists():
            folder.rename(before)
        (unfinished / folder.name).rename(folder)
    except BaseException:  # an interrupt as well
        if before.exists() and not folder.exists():
            before.rename(folder)
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _table(trade_offs: Sequence[TradeOff], chosen: TradeOff, answers: int) -> Table:
    ungated = trade_offs[0]
    table = Table(
        title=f"measured on {answers} answers that were not trained on", title_justify="left", show_edge=False
    )
    for heading in (
        "threshold",
        "accepted length\ntokens a step",
        "verified\ndrafts a step",
        "pruned\nof the drafts",
    ):
        table.add_column(heading, justify="right")
    table.add_column()
    shown = [each for each in sorted(trade_offs) if each is chosen or round(100 * each.threshold) % _SHOWN == 0]
    for each in shown:
        notes = (["no gate"] if each is ungated else []) + (["chosen"] if each is chosen else [])
        table.add_row(
            f"{each.threshold:g}",
            f"{each.accepted_length:.3f}",
            f"{each.verified:.3f}",
            f"{1 - each.verified / ungated.verified:.1%}",
            ", ".join(notes),
            style="bold green" if each is chosen else None,
        )
    return table


def _plot(trade_offs: Sequence[TradeOff], chosen: TradeOff, path: Path) -> None:
    from longcat_cli.plotting import BLUE, GREY, RED, figure, save

    title = "What the draft gate gives up and saves, by its threshold"
    drawn, axes = figure(title, "drafts verified (drafts a step)", "accepted length (tokens a step)")
    line = sorted(trade_offs)
    axes.plot([t.verified for t in line], [t.accepted_length for t in line], ".-", color=BLUE, lw=1.5)
    for point, marker, colour, name in (
        (trade_offs[0], "s", GREY, "no gate"),
        (chosen, "o", RED, f"threshold {chosen.threshold:g}"),
    ):
        label = f"{name}: {point.accepted_length:.2f} tokens for {point.verified:.2f} drafts"
        axes.plot(point.verified, point.accepted_length, marker, color=colour, ms=8, label=label)
    axes.set_xlim(0, None)
    save(drawn, path, legend="lower right")
