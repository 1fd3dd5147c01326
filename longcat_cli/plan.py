"""`longcat plan`: what a deployment holds, how fast it can be, and what it costs, computed before it is rented."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from longcat_cli import plan_report
from longcat_core.planning import cpu, hardware, imbalance, models, plan, rates, search
from longcat_core.planning import dry_run as reports
from longcat_core.planning.drafts import Drafts
from longcat_core.planning.figures import Figure
from longcat_core.planning.layout import Layout, layouts, precision
from longcat_core.planning.memory import KEPT_BYTES, SHARE
from longcat_core.planning.plan import Choice, Deployment, GoalError, Plan
from longcat_core.planning.rates import Rates


class Weights(StrEnum):
    bf16 = "bf16"
    fp8 = "fp8"
    fp8_ffns = "fp8-ffns"
    fp8_all = "fp8-all"


class Cache(StrEnum):
    bf16 = "bf16"
    fp8 = "fp8"
    fp8_plain = "fp8-plain"
    fp8_snapmla = "fp8-snapmla"


class Overlap(StrEnum):
    none = "none"
    two_batches = "two-batches"
    single_batch = "single-batch"


class Preset(StrEnum):
    table_7 = "report-table-7"
    table_6 = "report-table-6"


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help=f"{', '.join(models.known())}; a checkpoint's directory; a config.json."
        ),
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(help=f"How many of which: 8xH200; or a file of --calibrate. Known: {', '.join(hardware.gpus())}."),
    ] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Cached tokens of a request; 4096 by default.")] = None,
    batch: Annotated[
        float | None, typer.Option(min=0.001, help="Requests at once in each replica; by default all that fit.")
    ] = None,
    goal_tokens_per_user: Annotated[
        float | None, typer.Option(min=0.001, help="As many requests as can each have so many tokens a second.")
    ] = None,
    goal_dollars: Annotated[
        float | None, typer.Option(min=0.0, help="As fast for each as a million tokens at this price allow.")
    ] = None,
    weights: Annotated[
        Weights, typer.Option("--precision", help="fp8: experts alone; fp8-ffns: dense FFNs too; fp8-all: all.")
    ] = Weights.bf16,
    cache: Annotated[Cache, typer.Option(help="How a token is cached.")] = Cache.bf16,
    drafts: Annotated[int, typer.Option(min=0, help="Of the MTP layer, in a step.")] = 0,
    acceptance: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Of a draft whose predecessor was accepted; needed for drafts."),
    ] = None,
    gate: Annotated[bool, typer.Option("--gate", help="Drafts pass a gate (C2T), with its paper's numbers.")] = False,
    tp: Annotated[int | None, typer.Option(min=1, help="Ranks that share one replica of the attention.")] = None,
    dp: Annotated[int | None, typer.Option(min=1, help="Replicas of the attention.")] = None,
    ep: Annotated[int | None, typer.Option(min=1, help="Ranks with experts of their own: 1, or all.")] = None,
    find: Annotated[bool, typer.Option("--find", help="Try every layout; the best is shown.")] = False,
    overlap: Annotated[Overlap, typer.Option(help="What runs beside the all-to-all.")] = Overlap.none,
    shares: Annotated[
        str, typer.Option("--rates", help=f"What of the data sheet is reached: {', '.join(rates.sets())}.")
    ] = "stock",
    ffn_experts: Annotated[
        float | None, typer.Option(min=0.0, help="FFN experts a token; by default the mean of training.")
    ] = None,
    routing: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Recorded choices, JSON, see longcat inspect --record.")
    ] = None,
    eplb: Annotated[bool, typer.Option("--eplb", help="Experts of --routing are placed by their load.")] = False,
    share: Annotated[float, typer.Option(min=0.01, max=1.0, help="Of a GPU's memory, for the engine.")] = SHARE,
    kept_gb: Annotated[float, typer.Option(min=0.0, help="Kept back for activations and graphs.")] = KEPT_BYTES / 1e9,
    price: Annotated[float | None, typer.Option(min=0.0, help="Dollars a GPU hour.")] = None,
    dry_run: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of longcat dry-run --json: memory and launches as the engine has them."),
    ] = None,
    preset: Annotated[Preset | None, typer.Option(help="A table of the report beside what is computed.")] = None,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure this machine's CPU in a minute, and write it there.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the frontier over all layouts.")] = None,
) -> None:
    """Compute what a deployment of LongCat holds, how fast it decodes, and what it costs, from data sheets.

    Nothing is started and nothing is downloaded. Every assumption is listed with how it is known. The exit status is 1
    where the deployment does not fit or the goal is out of reach.
    """
    console = Console(width=None if Console().is_terminal else 160)
    try:
        if calibrate is not None:
            _calibrate(calibrate, console)
            return
        if preset is not None:
            plan_report.show_preset(preset, context, json, console)
            return
        if model is None or gpus is None:
            raise ValueError("wanted a MODEL and --gpus, or --preset, or --calibrate")
        machine, count, speed, listed = _machine(gpus, shares)
        if drafts and acceptance is None:
            raise ValueError("drafts: how many are accepted? --acceptance 0.8 is the report's theory, 0.9 its tables")
        if eplb and routing is None:
            raise ValueError("eplb: wanted --routing FILE, as random routing has nothing to balance")
        known = models.model(model)
        layout = _layout(known, count, tp, dp, ep, _inside(speed))
        deployment = Deployment(
            model=known,
            machine=machine,
            rates=speed,
            layout=layout,
            precision=precision(weights, cache),
            context=context or 4096,
            overlap=overlap,
            drafts=Drafts(drafts, acceptance or 0.0, gate),
            ffn_experts=ffn_experts,
            imbalance=_imbalance(routing, layout, eplb),
            share=share,
            kept_bytes=kept_gb * 1e9,
            dollars_an_hour=_price(price) or listed,
        )
        if dry_run is not None:
            deployment = plan.with_dry_run(deployment, reports.read(dry_run)[0])
        if problems := list(deployment.problems()):
            raise ValueError("; ".join(problems))

        def choose(each: Deployment) -> Choice:
            if goal_tokens_per_user is not None:
                return plan.for_users(each, goal_tokens_per_user)
            if goal_dollars is not None:
                return plan.for_dollars(each, goal_dollars)
            return plan.all_that_fit(each) if batch is None else plan.given(each, batch)

        if sum(each is not None for each in (batch, goal_tokens_per_user, goal_dollars)) > 1:
            raise ValueError("--batch, --goal-tokens-per-user, --goal-dollars: one of them")

        def value(each: Plan) -> float:
            """What is left open by a goal: a price leaves the speed of a user, a speed that of a GPU."""
            return each.tokens_per_second_a_gpu if goal_dollars is None else each.tokens_per_second_a_user

        found = search.find(deployment, choose, value) if find else []
        choice = found[0] if found else choose(deployment)
    except GoalError as error:
        typer.echo(f"longcat: out of reach: {error}", err=True)
        raise typer.Exit(1) from None
    except (ValueError, OSError) as error:
        typer.echo(f"longcat: {error}", err=True)
        raise typer.Exit(2) from None
    today = datetime.date.today()
    if json:
        typer.echo(plan_report.as_json(choice, found, today))
    else:
        plan_report.show(choice, found, today, console)
    if plot is not None:
        from longcat_cli.plan_plot import draw

        draw(search.points(search.deployments(deployment)), choice.plan, plot)
    if not choice.plan.fits:
        raise typer.Exit(1)


def _machine(text: str, shares: str) -> tuple[str, int, Rates, Figure | None]:
    """Its name, how many devices it has, their rates, and their price."""
    if text.endswith(".json"):
        name, speed = cpu.calibrated(Path(text))
        return name, 1, speed, None
    machine = hardware.machine(text)
    speed = rates.rates(machine.gpu, shares)
    return str(machine), machine.count, speed, machine.gpu.figures.get("price_dollars_per_hour")


def _inside(speed: Rates) -> int:
    """Devices that NVLink connects, whatever the set of rates counts."""
    return int({figure.name: figure.value for figure in speed.figures}.get("nvlink_gpus", 1))


def _layout(model: models.Model, gpus: int, tp: int | None, dp: int | None, ep: int | None, inside: int) -> Layout:
    """What is not given: tensor parallelism over a node as far as heads allow, and expert parallelism over all."""
    if tp is None and dp is None:
        tp = max(each.tp for each in layouts(model, gpus) if each.tp <= inside)
    if tp is None:
        tp = gpus // (dp or 1)
    if dp is None:
        dp = gpus // tp
    if tp * dp != gpus:
        raise ValueError(f"tp {tp} x dp {dp} = {tp * dp}, wanted the {gpus} GPUs of --gpus")
    return Layout(tp, dp, gpus if ep is None else ep)


def _imbalance(routing: Path | None, layout: Layout, eplb: bool) -> float | None:
    if routing is None:
        return None
    return imbalance.recorded_imbalance(imbalance.read_counts(routing), max(1, layout.ep), eplb)


def _price(dollars: float | None) -> Figure | None:
    if dollars is None:
        return None
    name, unit = "price_dollars_per_hour", "dollars a GPU hour"
    return Figure(name, dollars, unit, "assumed", "given with --price", datetime.date.today())


def _calibrate(path: Path, console: Console) -> None:
    from longcat_core.planning import calibration

    with console.status("measuring bandwidth, products and operators"):
        calibration.write(calibration.calibrate(), path)
    console.print(f"{path}: give it to --gpus")
