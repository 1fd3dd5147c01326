"""`longcat dry-run`: one rank of a deployment, built by the engine itself, on GPUs that are not there."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longcat_core.null_gpu.build import NullGpuError
from longcat_core.null_gpu.process import run
from longcat_core.planning import dry_run, hardware
from longcat_core.planning.dry_run import Memory, Report, Request, Step
from longcat_core.planning.hardware import Machine

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Of the subcommand: what it does not know is the engine's."""
LARGEST_TENSORS = 12
ENOUGH = 16
"""How many times a GPU's memory is given to a deployment that does not fit, to see what it needs."""


class Engine(StrEnum):
    vllm = "vllm"
    sglang = "sglang"


def command(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint's directory, or a config.json; before any option.")
    ],
    gpus: Annotated[str, typer.Option(help=f"How many of which: 8xH200. Known: {', '.join(hardware.gpus())}.")],
    engine: Annotated[Engine | None, typer.Option(help="By default the one that is installed.")] = None,
    rank: Annotated[int, typer.Option(min=0, help="The rank to build; the first of a tensor-parallel group.")] = 0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="In the step of prefill, all requests together.")] = 2048,
    requests: Annotated[int, typer.Option(min=1, help="In both steps.")] = 16,
    no_trace: Annotated[bool, typer.Option("--no-trace", help="Leave torch.compile out, as SGLang does.")] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all that was found there as well.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the engine's whole log.")] = False,
) -> None:
    """Build one rank of a deployment without GPUs and without weights, and say what was chosen and what it needs.

    Further options are the engine's own, as you would give them to `vllm serve`. The engine runs as it would on these
    GPUs, but kernels are counted and not run: nothing is computed, and nothing is timed. The exit status is 1 where
    the deployment is refused, does not fit or fails.
    """
    console = Console(width=None if Console().is_terminal else 160)
    try:
        machine = hardware.machine(gpus)
        package = f"longcat_{_engine(engine)}"
        with _directory(model) as directory:
            first = Request(directory, tuple(context.args), rank=rank, prompt_tokens=prompt_tokens, requests=requests)
            with Console(stderr=True).status("building one rank"):
                is_traced = not no_trace and package == "longcat_vllm"
                reports = _reports(package, first, machine, is_traced, verbose)
    except (NullGpuError, ValueError) as error:
        typer.echo(f"longcat: {error}", err=True)
        raise typer.Exit(2) from None
    if json is not None:
        dry_run.write(reports, json)
    show(reports[0], reports[1] if len(reports) > 1 else None, console)
    if any(each.refused or each.does_not_fit or each.failed for each in reports[:1]):
        raise typer.Exit(1)


def _engine(wanted: Engine | None) -> Engine:
    there = [engine for engine in Engine if importlib.util.find_spec(engine) is not None]
    if wanted is None and there:
        return there[0]
    if wanted is None or wanted not in there:
        raise NullGpuError(f"engine: {wanted or 'none'} is not installed here; install its CUDA build")
    return wanted


def _reports(package: str, request: Request, machine: Machine, is_traced: bool, is_verbose: bool) -> list[Report]:
    """The deployment's; then a trace of it, or what it needs where it does not fit."""
    (report,) = run(package, [request], machine, is_verbose)
    if report.does_not_fit and not report.steps:
        larger = replace(machine, gpu=replace(machine.gpu, memory_mib=ENOUGH * machine.gpu.memory_mib))
        return [report, *run(package, [request], larger, is_verbose)]
    if is_traced and not (report.refused or report.failed):
        return [report, *run(package, [replace(request, is_traced=True)], machine, is_verbose)]
    return [report]


@contextmanager
def _directory(model: str) -> Iterator[str]:
    """Of a checkpoint, or of a copy of a lone config.json; a name of the Hub as it is."""
    if not model.endswith(".json"):
        yield model
        return
    if not Path(model).is_file():
        raise ValueError(f"config.json: {model!r} is no file")
    with tempfile.TemporaryDirectory(prefix="longcat-config-") as directory:
        shutil.copy(model, Path(directory) / "config.json")
        yield directory


def show(report: Report, second: Report | None, console: Console) -> None:
    """second: the traced deployment, or the same on larger GPUs."""
    console.print(f"[bold]{report.machine}[/bold], rank {report.request.rank}, {report.engine}; nothing was computed")
    for mark, text in (("refused", report.refused), ("does not fit", report.does_not_fit), ("failed", report.failed)):
        if text:
            console.print(f"[red]{mark}[/red]: {escape(text)}")
    needed = second if second is not None and not second.request.is_traced else report
    if needed.choices:
        console.print(_choices(needed))
    if needed.memory is not None:
        console.print(_memory(needed.memory, limit=report.memory.total if report.memory else None))
    if needed.tensors:
        console.print(_tensors(needed))
    if needed.steps:
        console.print(_steps(needed.steps))
    if second is not None and second.request.is_traced:
        _show_trace(second, console)
    for line in report.log:
        console.print(escape(f"  {line}"), style="dim", highlight=False)


def _choices(report: Report) -> Table:
    table = Table("chosen", "", show_edge=False)
    for name, value in report.choices.items():
        table.add_row(name, escape(value))
    return table


def _memory(memory: Memory, limit: int | None) -> Table:
    table = Table("memory of one GPU", "GB", show_edge=False)
    table.columns[1].justify = "right"
    rows = {
        "all": limit or memory.total,
        "weights": memory.weights,
        "activations, at most": memory.activations,
        "left for the cache": memory.cache if limit in (None, memory.total) else 0,
    }
    for name, size in rows.items():
        table.add_row(name, f"{size / 1e9:.1f}" if size or name != "left for the cache" else "none")
    table.caption = f"cache: {memory.cache_a_token:,} bytes a token, {memory.cache_tokens:,} tokens"
    return table


def _tensors(report: Report) -> Table:
    table = Table("tensors, largest first", "number", "shape", "dtype", "GB", show_edge=False)
    for row in report.tensors[:LARGEST_TENSORS]:
        shape = " x ".join(map(str, row.shape))
        table.add_row(row.name, str(row.count), shape, row.dtype, f"{row.bytes / 1e9:.2f}")
    table.caption = f"all: {report.parameter_bytes / 1e9:.1f} GB"
    return table


def _steps(steps: tuple[Step, ...]) -> Table:
    titles = [title for step in steps for title in (f"{step.name}, {step.tokens} tokens", "a layer")]
    table = Table("launches", *titles, show_edge=False)
    kinds = list(dict.fromkeys(kind for step in steps for kind in step.by_kind()))
    for kind in kinds:
        cells = [(str(step.by_kind().get(kind, 0)), _in_a_layer(step, kind)) for step in steps]
        table.add_row(kind, *(cell for pair in cells for cell in pair))
    table.add_row("all", *(str(n) for step in steps for n in (step.launches, sum(step.in_layer(1).values()))))
    return table


def _in_a_layer(step: Step, kind: str) -> str:
    count, beside = step.in_layer(1).get(kind, 0), step.beside(1).get(kind, 0)
    return f"{count}, {beside} on a second stream" if beside else str(count)


def _show_trace(traced: Report, console: Console) -> None:
    for mark, text in (("refused", traced.refused), ("failed", traced.failed)):
        if text:
            console.print(f"[red]torch.compile {mark}[/red]: {escape(text)}")
    for graph in traced.graphs:
        console.print(
            f"torch.compile traces {graph.model} (of two layers) without a break: {sum(graph.operators.values())} "
            f"operators in {graph.pieces} pieces"
        )
