"""`longcat quantize`: an FP8 checkpoint by the recipe of the LongCat-Flash report, which keeps some layers in bf16."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longcat_cli import loading
from longcat_cli.loading import LoadingError
from longcat_core.config import ConfigError
from longcat_core.recipe.rule import Keep, Score, Thresholds

if TYPE_CHECKING:
    from torch import Tensor

    from longcat_core.recipe.calibration import Measured
    from longcat_core.recipe.conversion import Conversion, Source

_USUAL = Thresholds()
SEQUENCE = 512
"""Tokens of a text that are read as one sequence, at most."""


class Precision(StrEnum):
    fp8 = "fp8"
    bf16 = "bf16"


class QuantizingError(ValueError):
    """Options that do not go together, or a directory that cannot be written to; the message says what is wanted."""


@dataclass(frozen=True)
class Options:
    """What decides the bytes that are written, beside the checkpoint and the text."""

    keep: Keep
    budget: int | None
    mtp: Precision
    thresholds: Thresholds

    @property
    def is_measured(self) -> bool:
        """Whether it takes a text to choose the layers."""
        return self.keep is not Keep.none or self.budget is not None

    def check(self) -> None:
        for option, value in (
            ("--extreme-activation", self.thresholds.activation),
            ("--large-relative-error", self.thresholds.relative),
            ("--large-absolute-error", self.thresholds.absolute),
        ):
            if not 1 < value < math.inf:
                raise QuantizingError(f"{option}: {value}, wanted a number above 1, which the median is multiplied by")
        if self.budget is not None and self.budget < 0:
            raise QuantizingError(f"--budget: {self.budget}, wanted bytes, 0 or more")
        if self.budget is not None and self.keep is not Keep.intersection:
            raise QuantizingError(f"--budget chooses the layers itself; leave out --keep {self.keep}")


def command(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Directory of a checkpoint in bf16 or fp32.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write: a new one, or an unfinished run's.")],
    text: Annotated[Path | None, typer.Option(help="To calibrate on: a UTF-8 file, as the model is to see it.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to read at most, from the beginning.")] = 4096,
    keep: Annotated[
        Keep, typer.Option(help="Which layers stay in bf16; the report's recipe is the intersection.")
    ] = Keep.intersection,
    budget: Annotated[
        int | None, typer.Option(help="Instead of --keep: bytes that the layers in bf16 may add to all in FP8.")
    ] = None,
    mtp: Annotated[Precision, typer.Option(help="Precision of the draft layer.")] = Precision.fp8,
    extreme_activation: Annotated[
        float, typer.Option(help="An input is extreme from so many times the median layer's largest.")
    ] = _USUAL.activation,
    large_relative_error: Annotated[
        float, typer.Option(help="An error of weights or outputs is large from so many times the median layer's.")
    ] = _USUAL.relative,
    large_absolute_error: Annotated[
        float, typer.Option(help="So is an absolute error of outputs, beside the layers of its kind.")
    ] = _USUAL.absolute,
    plot: Annotated[Path | None, typer.Option(help="Draw inputs and errors of all layers into this .png file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show sizes only; reads no weights and no text.")] = False,
) -> None:
    """Write an FP8 checkpoint that vLLM and SGLang load, with the layers in bf16 that FP8 is bad for.

    The model, in plain PyTorch and with a few weights in memory at a time, reads a text; the layers that stay in bf16
    are those with extreme inputs and a large error in FP8. An interrupted run goes on when it is started again.
    """
    errors = Console(stderr=True, highlight=False)
    with errors.status("importing torch"):
        from longcat_core.recipe.calibration import CalibrationError
        from longcat_core.weights.audit import CheckpointError
    options = Options(keep, budget, mtp, Thresholds(extreme_activation, large_relative_error, large_absolute_error))
    try:
        options.check()
        _check_plot(plot, options, dry_run)
        _quantize(source, out, text, tokens, options, plot, dry_run, errors)
    except (ConfigError, CheckpointError, LoadingError, CalibrationError, QuantizingError, OSError) as error:
        errors.print(f"longcat quantize: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _check_plot(plot: Path | None, options: Options, dry_run: bool) -> None:
    if plot is None:
        return
    if dry_run or not options.is_measured:
        option = "--dry-run" if dry_run else "--keep none"
        raise QuantizingError(f"--plot draws what is measured, and with {option} nothing is; leave it out")
    if plot.suffix != ".png" or not plot.absolute().parent.is_dir():
        raise QuantizingError(f"--plot: {plot}, wanted a .png file in a directory that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise QuantizingError("matplotlib, which draws the plot, is absent; pip install 'longcat-serving[train]'")


def _quantize(
    directory: Path,
    out: Path,
    text: Path | None,
    tokens: int,
    options: Options,
    plot: Path | None,
    dry_run: bool,
    console: Console,
) -> None:
    from longcat_cli import quantization_report
    from longcat_core.recipe import choice
    from longcat_core.recipe.conversion import PROGRESS, Conversion, Source, write_json

    if out.resolve().is_relative_to(directory.resolve()):
        raise QuantizingError(f"{out} is in the source, {directory}; name a directory outside it")
    source = Source(directory)
    table_console = Console(width=None if Console().is_terminal else 160, highlight=False)
    mtp_in_fp8 = options.mtp is Precision.fp8
    if dry_run:
        _unfinished(out)
        report = quantization_report.Report(source, Conversion(source, (), mtp_in_fp8), {}, {})
        table_console.print(report.sizes())
        return
    ids = _tokens(directory, text, tokens, source) if options.is_measured else None
    settings = _settings(source, ids, options)
    before = _unfinished(out)
    if before is not None and before["settings"] != settings:
        raise QuantizingError(
            f"{out}: of an unfinished run with other settings, text or source; start it as before, name another "
            "directory, or remove it"
        )
    if before is None:
        _require_space(out, Conversion(source, (), mtp_in_fp8))

    measured = None
    if ids is not None:
        measured = _read(before["measured"]) if before is not None else _calibrate(source, ids, console)
    out.mkdir(parents=True, exist_ok=True)
    found = None if measured is None else {name: asdict(each) for name, each in measured.items()}
    write_json(out / PROGRESS, {"settings": settings, "measured": found})

    kept: set[str] = set()
    scores: dict[str, Score] = {}
    if measured is not None:
        scores = choice.scores(source.layers, measured, options.thresholds)
        if options.budget is not None:
            kept = choice.within_budget(source.layers, measured, source.extra_bytes, options.budget)
        else:
            kept = choice.kept(source.layers, scores, options.keep)
    conversion = Conversion(source, kept, mtp_in_fp8)
    report = quantization_report.Report(source, conversion, measured or {}, scores)
    table_console.print(report.measurements() if measured else report.sizes())
    for line in report.remarks():
        table_console.print(line, markup=False, soft_wrap=True)
    if plot is not None:
        report.plot(plot)
    _require_space(out, conversion)
    _write(conversion, out, console)
    typer.echo(f"{out}: try `vllm serve {out}` or `python -m sglang.launch_server --model-path {out}`")


def _tokens(directory: Path, text: Path | None, count: int, source: Source) -> Tensor:
    """The beginning of the text as sequences of equal length, int64 [sequences, length]; what does not fill one more is
    left out."""
    import torch

    if text is None:
        raise QuantizingError(
            "--text: missing; give a UTF-8 file to calibrate on, or --keep none for all linear layers in FP8"
        )
    ids: list[int] = loading.read_tokenizer(directory).encode(loading.read_text(text)).ids[:count]
    if not ids:
        raise LoadingError(f"{text}: no tokens, wanted a text to calibrate on")
    loading.require_in_vocabulary(ids, directory, source.config, str(text))
    sequences = -(-len(ids) // min(SEQUENCE, source.config.max_position_embeddings))
    length = len(ids) // sequences
    return torch.tensor(ids[: sequences * length]).view(sequences, length)


def _settings(source: Source, ids: Tensor | None, options: Options) -> dict[str, Any]:
    text = None if ids is None else hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    found = {**asdict(options), "tokens": text, "source": source.identity()}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _unfinished(out: Path) -> dict[str, Any] | None:
    """What an unfinished run noted in `out`; None if there is nothing yet.

    Raises:
        QuantizingError: if there is something else.
    """
    from longcat_core.recipe.conversion import PROGRESS

    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        found: dict[str, Any] = json.loads((out / PROGRESS).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise QuantizingError(f"{out} exists and is no unfinished run; name another directory, or remove it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise QuantizingError(f"{out / PROGRESS}: not JSON ({error}); remove {out}") from None
    if not isinstance(found, dict) or not {"settings", "measured"} <= found.keys():
        raise QuantizingError(f"{out / PROGRESS}: not of an unfinished run; remove {out}")
    return found


def _require_space(out: Path, conversion: Conversion) -> None:
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise QuantizingError(f"{out}: {there} is no directory that can be written to; name another one")
    wanted, free = conversion.unwritten_bytes(out), shutil.disk_usage(there).free
    if wanted > free:
        raise QuantizingError(f"{there}: {free:,} bytes free, wanted {wanted:,}; make room, or name another directory")


def _read(found: dict[str, dict[str, Any]]) -> dict[str, Measured]:
    from longcat_core.recipe.calibration import Measured

    return {name: Measured(**each) for name, each in found.items()}


def _calibrate(source: Source, ids: Tensor, console: Console) -> dict[str, Measured]:
    from longcat_core.recipe.calibration import calibrate

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"calibrating on {ids.numel():,} tokens, linear layers", total=len(source.layers))
        return calibrate(source.tensors, source.config, ids, lambda layer: progress.advance(task))


def _write(conversion: Conversion, out: Path, console: Console) -> None:
    total = sum(each.after for each in conversion.bytes_by_kind().values())
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("writing", total=total)
        conversion.write(out, lambda written: progress.advance(task, written))
