"""What `longcat plan` prints: memory, stages and operations, rates, price, command lines, assumptions; and as JSON."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longcat_core.planning import launch, report_tables
from longcat_core.planning.figures import Figure
from longcat_core.planning.layout import precision
from longcat_core.planning.memory import checkpoint_bytes, weights
from longcat_core.planning.plan import Choice, Deployment, Plan, assumptions, notes
from longcat_core.planning.report_tables import Row

BOUNDS = {"given": "as asked for", "memory": "bound by memory", "time": "bound by time"}
SHOWN_LAYOUTS = 8
SHOWN_BOTTLENECKS = 4


def show(choice: Choice, found: Sequence[Choice], today: datetime.date, console: Console) -> None:
    """found: what other layouts come to, where they were looked for."""
    plan, deployment = choice.plan, choice.plan.deployment
    model = deployment.model
    console.print(
        f"[bold]{escape(model.name)}[/bold] on {deployment.machine}, {deployment.layout}, "
        f"overlap: {deployment.overlap}; rates: {deployment.rates.name}"
    )
    activated = model.activated_parameters(deployment.load(1).ffn_experts)
    of_mtp = f", {_short(model.mtp_parameters)} in the MTP layer" if model.has_mtp else ""
    console.print(f"{_short(model.total_parameters)} parameters, {_short(activated)} a token{of_mtp}", highlight=False)
    if len(found) > 1:
        console.print(_layouts(found))
    console.print(_memory(choice))
    console.print(_cache(choice), highlight=False, soft_wrap=True)
    if plan.fits:
        console.print(_stages(plan))
        console.print(_step(plan), highlight=False, soft_wrap=True)
        console.print(_answer(choice))
    else:
        console.print(
            f"[red]does not fit[/red]: {plan.missing_bytes / 1e9:.1f} GB a GPU are missing for {plan.requests:g} "
            f"request{'s' if plan.requests != 1 else ''} of {deployment.context} tokens in a replica"
        )
    if plan.fits:
        for engine, line in launch.commands(deployment, plan.requests).items():
            console.print(f"{engine}: [bold]{escape(line)}[/bold]", highlight=False, soft_wrap=True)
    for line in (*launch.remarks(deployment), *notes(deployment, today)):
        console.print(f"- {escape(line)}", highlight=False, soft_wrap=True)
    console.print(_assumptions(assumptions(deployment, today)))


def _short(parameters: float) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _layouts(found: Sequence[Choice]) -> Table:
    table = _table("layout", "requests a replica", "tokens/s a GPU", "tokens/s a user", "bound")
    for choice in found[:SHOWN_LAYOUTS]:
        plan = choice.plan
        cells = (f"{plan.requests:g}", f"{plan.tokens_per_second_a_gpu:.0f}", f"{plan.tokens_per_second_a_user:.1f}")
        table.add_row(str(plan.deployment.layout), *cells, choice.bound)
    return table


def _memory(choice: Choice) -> Table:
    deployment = choice.plan.deployment
    memory = deployment.memory
    table = _table("memory of one GPU", "GB")
    for name, size in (
        ("all", memory.total_bytes),
        (f"not the engine's: {1 - memory.share:.0%}", memory.total_bytes * (1 - memory.share)),
        ("kept back for activations and graphs", memory.kept_bytes),
        *((f"weights: {part.replace('_', ' ')}", size) for part, size in vars(memory.weights).items() if size),
        ("weights", memory.weights_bytes),
        ("room for the cache", memory.room_bytes),
    ):
        table.add_row(name, f"{size / 1e9:.1f}" if abs(size) >= 1e8 else f"{size / 1e9:.4f}")
    return table


def _cache(choice: Choice) -> str:
    deployment = choice.plan.deployment
    memory = deployment.memory
    return (
        f"cache: {memory.cache_bytes_a_token:,.0f} bytes a token on each GPU; a replica ({deployment.layout.tp} "
        f"GPU{'s' if deployment.layout.tp > 1 else ''}) holds {memory.tokens_a_replica:,} tokens, "
        f"{choice.by_memory:,} requests of {deployment.context}{_range(deployment)}"
    )


def _range(deployment: Deployment) -> str:
    """Of an FP8 release it is not known which layers beside experts are in FP8."""
    if deployment.precision.experts != "fp8" or deployment.precision.attention == "fp8":
        return ""
    with_mtp = deployment.drafts.count > 0
    least = weights(deployment.model, deployment.layout, precision("fp8-all"), with_mtp).total
    return f"; weights are {least / 1e9:.1f} GB if all linear layers are in FP8"


def _stages(plan: Plan) -> Table:
    table = _table("stage of a layer", "operation", "us", "bound", "MB read", "GFLOP", "MB sent, one way")
    for stage in plan.step.stages:
        table.add_row(f"[bold]{stage.name}[/bold]", "", f"[bold]{stage.seconds * 1e6:.1f}[/bold]", "", "", "", "")
        for n, track in enumerate(stage.tracks):
            for each in track:
                cost = each.cost
                beside = "beside it: " if n else ""
                table.add_row(
                    "",
                    beside + each.name.replace("_", " "),
                    f"{each.seconds * 1e6:.1f}",
                    each.bound,
                    f"{cost.memory_bytes / 1e6:.1f}",
                    f"{(cost.product_operations + cost.attention_operations) / 1e9:.1f}",
                    f"{(cost.nvlink_bytes + cost.network_bytes) / 1e6:.2f}",
                )
    table.add_row("launches and gaps", "", f"{plan.step.overhead_seconds * 1e6:.1f}", "latency", "", "", "")
    return table


def _step(plan: Plan) -> str:
    step = plan.step
    dense = f", dense layers {step.dense_layer_seconds * 1e3:.2f} ms" if step.dense_layer_seconds else ""
    engine = f", engine {step.engine_seconds * 1e3:.2f} ms" if step.engine_seconds else ""
    return (
        f"step: {step.layers} layers of {step.layer_seconds * 1e6:.0f} us{dense}{engine}, output head "
        f"{step.head_seconds * 1e3:.2f} ms, drafts {step.mtp_seconds * 1e3:.2f} ms: {step.seconds * 1e3:.2f} ms"
    )


def _answer(choice: Choice) -> Table:
    plan, deployment = choice.plan, choice.plan.deployment
    table = _table("decode", "")
    price = plan.dollars_a_million_tokens
    unverified = deployment.dollars_an_hour is not None and deployment.dollars_an_hour.is_unverified
    rows = {
        "requests at once, in a replica": f"{plan.requests:g}, {BOUNDS[choice.bound]}",
        "by time, by memory": f"{_count(choice.by_time)}, {choice.by_memory:,}",
        "tokens a step of a request": f"{deployment.drafts.tokens_a_step:.2f}",
        "time a token": f"{plan.seconds_a_token * 1e3:.2f} ms",
        "tokens/s a user": f"{plan.tokens_per_second_a_user:.1f}",
        "tokens/s a GPU": f"{plan.tokens_per_second_a_gpu:.0f}",
        "dollars a million tokens": "no price" if price is None else f"{price:.3f}{' (unverified)' * unverified}",
        "bottleneck": "; ".join(
            f"{each.operation.replace('_', ' ')} ({each.bound}) {each.share:.0%}"
            for each in plan.bottlenecks()[:SHOWN_BOTTLENECKS]
        ),
    }
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _count(requests: float | None) -> str:
    return "no goal" if requests is None else f"{requests:,.0f}"


def _assumptions(figures: Sequence[Figure]) -> Table:
    table = Table("assumed or given", "value", "known as", "source", "date", show_edge=False)
    for each in figures:
        mark = f"[yellow]{each.mark}[/yellow]" if each.is_unverified else each.mark
        table.add_row(f"{each.name}", f"{each.value:g} {escape(each.unit)}", mark, escape(each.source), str(each.date))
    return table


def as_json(choice: Choice, found: Sequence[Choice], today: datetime.date) -> str:
    """Of the plan, and of the other layouts without their stages."""
    plan, deployment = choice.plan, choice.plan.deployment
    memory = deployment.memory
    raw = {
        **_summary(choice),
        "model": deployment.model.name,
        "machine": deployment.machine,
        "rates": deployment.rates.name,
        "overlap": deployment.overlap,
        "context_tokens": deployment.context,
        "precision": asdict(deployment.precision),
        "parameters": deployment.model.total_parameters,
        "mtp_parameters": deployment.model.mtp_parameters if deployment.model.has_mtp else 0,
        "activated_parameters": deployment.model.activated_parameters(deployment.load(1).ffn_experts),
        "checkpoint_bytes": checkpoint_bytes(deployment.model, deployment.precision),
        "memory_of_a_gpu": {
            "total_bytes": memory.total_bytes,
            "share": memory.share,
            "kept_bytes": memory.kept_bytes,
            "weights_bytes": memory.weights_bytes,
            "weights_bytes_by_part": asdict(memory.weights),
            "cache_room_bytes": memory.room_bytes,
            "cache_bytes_a_token": memory.cache_bytes_a_token,
            "tokens_a_replica": memory.tokens_a_replica,
        },
        "step_seconds": plan.step.seconds,
        "layers": plan.step.layers,
        "layer_seconds": plan.step.layer_seconds,
        "layer_overhead_seconds": plan.step.overhead_seconds,
        "engine_seconds": plan.step.engine_seconds,
        "stages": [
            {
                "name": stage.name,
                "seconds": stage.seconds,
                "tracks": [[asdict(each) for each in track] for track in stage.tracks],
            }
            for stage in plan.step.stages
        ],
        "bottlenecks": [asdict(each) for each in plan.bottlenecks()],
        "commands": launch.commands(deployment, plan.requests) if plan.fits else {},
        "notes": [*launch.remarks(deployment), *notes(deployment, today)],
        "assumptions": [asdict(each) for each in assumptions(deployment, today)],
        "layouts": [_summary(each) for each in found],
    }
    return json.dumps(raw, indent=1, default=str)


def _summary(choice: Choice) -> dict[str, Any]:
    plan = choice.plan
    return {
        "layout": asdict(plan.deployment.layout),
        "fits": plan.fits,
        "missing_bytes": plan.missing_bytes,
        "requests_a_replica": plan.requests,
        "bound": choice.bound,
        "requests_by_time": choice.by_time,
        "requests_by_memory": choice.by_memory,
        "seconds_a_token": plan.seconds_a_token,
        "tokens_per_second_a_user": plan.tokens_per_second_a_user,
        "tokens_per_second_a_gpu": plan.tokens_per_second_a_gpu,
        "dollars_a_million_tokens": plan.dollars_a_million_tokens,
    }


# -- the report's tables ----------------------------------------------------------------------


def show_preset(preset: str, context: int | None, is_json: bool, console: Console) -> None:
    """A table of the report beside what is computed, with every assumption.

    Raises:
        ValueError: if a context is given for measured rows, which have their own.
    """
    if preset == "report-table-7":
        rows, assumed = report_tables.theory(context)
        tables = {"report": rows}
    else:
        if context is not None:
            raise ValueError("--context: the rows of report-table-6 have their own")
        tables = {name: report_tables.measured(name)[0] for name in report_tables.rates_of_table_6()}
        assumed = report_tables.measured()[1]
    if is_json:
        typer.echo(_preset_json(tables, assumed))
        return
    for name, rows in tables.items():
        console.print(_comparison(name, rows))
        shares = [
            each for each in rows[0].plan.deployment.rates.figures if each.name.endswith(("share", "_us", "speedup"))
        ]
        values = ", ".join(f"{each.name} {each.value:g}" for each in shares)
        console.print(f"- {rows[0].plan.deployment.rates.about}: {values}", highlight=False, soft_wrap=True)
    for each in assumed:
        console.print(f"- {each.known}: {escape(each.what)}", highlight=False, soft_wrap=True)
    if preset == "report-table-6":
        console.print(
            "- the rates are fitted, and are no measurement: the set without any overlap (meituan-serial) fits best,\n"
            "  so these rows cannot tell overlap from none",
            highlight=False,
        )


def _comparison(name: str, rows: Sequence[Row]) -> Table:
    table = _table("", "quantity", "computed", "printed", "error")
    table.title = f"rates: {name}"
    for row in rows:
        for n, each in enumerate(row.comparisons):
            title = row.name if not n else ""
            computed = f"{each.computed:.{each.digits}f} {each.unit}"
            table.add_row(title, each.quantity, computed, f"{each.printed:g}", f"{each.error:+.1%}")
    return table


def _preset_json(tables: dict[str, list[Row]], assumed: Sequence[report_tables.Assumption]) -> str:
    raw = {
        "rates": {
            name: [{"name": row.name, "comparisons": [asdict(each) for each in row.comparisons]} for row in rows]
            for name, rows in tables.items()
        },
        "assumptions": [asdict(each) for each in assumed],
    }
    return json.dumps(raw, indent=1)


def _table(*headings: str) -> Table:
    table = Table(show_edge=False)
    for n, heading in enumerate(headings):
        table.add_column(
            heading, justify="right" if n and heading not in ("operation", "bound", "quantity", "") else "left"
        )
    return table
