"""`longcat top`: what the tokens of a running server take, live in a terminal."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Annotated

import typer
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from longcat_cli.server_metrics import (
    BUSIEST_EXPERT,
    BUSIEST_RANK,
    CHOICES,
    EXPERTS_A_TOKEN,
    MEAN_EXPERT,
    MEAN_RANK,
    TARGET,
    MetricsError,
    Names,
    Reading,
    Samples,
    metrics_url,
    read,
)
from longcat_cli.terminal import printable

BARS = "·▁▂▃▄▅▆▇█"


def command(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of the server, like http://localhost:8000.")],
    interval: Annotated[float, typer.Option(min=1, help="Seconds between two readings.")] = 4,
) -> None:
    """Show how many FFN experts the tokens of a running server take, how even the load is, and what drafts bring.

    The server's /metrics are read again and again, until Ctrl-C. Where the output is no terminal, they are read once.
    """
    with suppress(KeyboardInterrupt):
        try:
            metrics = metrics_url(url)
            last = read(metrics)
        except MetricsError as error:
            Console(stderr=True).print(_complaint(error), soft_wrap=True)
            raise typer.Exit(1) from None
        if Console().is_terminal:
            watch(metrics, last, interval)
        else:
            Console(width=160, highlight=False).print(view(last))


def watch(metrics: str, last: Reading, interval: float) -> None:
    """Show what comes after `last`, for ever. A server that is gone for a while may come back."""
    latest = view(last)
    with Live(latest, console=Console(highlight=False), auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            try:
                now = read(metrics)
            except MetricsError as error:
                live.update(Group(latest, _complaint(error)), refresh=True)
            else:
                latest, last = view(now, last), now
                live.update(latest, refresh=True)


def _complaint(error: MetricsError) -> Text:
    return Text(f"longcat top: {printable(str(error))}", style="red")


def view(now: Reading, before: Reading | None = None) -> RenderableType:
    """What was counted since the server started; with a reading before this one also what was counted since then."""
    running, waiting = (now.samples.sum(name, priority="") for name in (now.names.running, now.names.waiting))
    title = Text.assemble(
        (f"{printable(now.model)} in {now.names.engine}", "bold"),
        f"; requests: {running:g} running, {waiting:g} waiting",
        f"; the dial's target: {now.samples.sum(TARGET):g} FFN experts a token" if now.samples.has(TARGET) else "",
    )
    columns = {"since the start": summary(now.names, now.samples)}
    of_layers, period = now.samples, "since the start"
    if before is not None:
        grown, seconds = now.since(before), now.seconds - before.seconds
        columns = {f"last {seconds:.0f} s": summary(now.names, grown, seconds), **columns}
        if grown.sum(f"{EXPERTS_A_TOKEN}_count"):
            of_layers, period = grown, f"last {seconds:.0f} s"
    figures = Table("", *columns, box=None, padding=(0, 2, 0, 0))
    for name in columns["since the start"]:
        figures.add_row(name, *(column[name] for column in columns.values()))
    return Group(title, Text(), Columns([figures, layers(of_layers, period)], padding=(1, 4)))


def summary(names: Names, samples: Samples, seconds: float | None = None) -> dict[str, str]:
    """The figures of a server. samples: counted in so many seconds, or since the server started."""

    def counted(name: str, **labels: str) -> str:
        number = samples.sum(name, **labels)
        return f"{number:,.0f}" if seconds is None else f"{number / seconds:,.1f}/s"

    def ratio(form: str, numerator: str, denominator: str) -> str:
        return quotient(form, samples.sum(numerator), samples.sum(denominator))

    rows = {
        "tokens generated": counted(names.generated, **names.generated_labels),
        "seconds to first token, mean": ratio(".3f", f"{names.first_token}_sum", f"{names.first_token}_count"),
        "FFN experts a token, mean": ratio(".2f", f"{EXPERTS_A_TOKEN}_sum", f"{EXPERTS_A_TOKEN}_count"),
        "expert choices that were free": quotient(".1%", samples.sum(CHOICES, kind="zero"), samples.sum(CHOICES)),
        "busiest expert over the mean": ratio(".2f", BUSIEST_EXPERT, MEAN_EXPERT),
    }
    if samples.has(BUSIEST_RANK):
        rows["busiest rank over the mean"] = ratio(".2f", BUSIEST_RANK, MEAN_RANK)
    for position, accepted in samples.sums(names.accepted, by="position").items():
        rows[f"drafts accepted, position {position}"] = quotient(".1%", accepted, samples.sum(names.chains))
    if samples.has(names.pruned):
        rows["drafts pruned"] = counted(names.pruned)
    return rows


def layers(samples: Samples, period: str) -> Table:
    """Layer by layer, with a bar for the tokens of each number of FFN experts."""
    by_layer = {
        layer: samples.sums(f"{EXPERTS_A_TOKEN}_bucket", by="le", layer=layer)
        for layer in samples.sums(f"{EXPERTS_A_TOKEN}_count", by="layer")
    }
    most = max(float(bound) for bounds in by_layer.values() for bound in bounds if bound != "+Inf")
    titles = ("layer", "FFN experts", f"tokens with 0 to {most:.0f}", "busiest expert")
    table = Table(*titles, title=f"layers, {period}", title_justify="left", box=None)
    for layer, bounds in by_layer.items():
        sums = {name: samples.sum(name, layer=layer) for name in (BUSIEST_EXPERT, MEAN_EXPERT)}
        tokens = samples.sum(f"{EXPERTS_A_TOKEN}_count", layer=layer)
        table.add_row(
            layer,
            quotient(".2f", samples.sum(f"{EXPERTS_A_TOKEN}_sum", layer=layer), tokens),
            bars([high - low for low, high in pairwise([0.0, *bounds.values()])][:-1]),
            quotient(".2f", *sums.values()),
        )
    return table


def quotient(form: str, numerator: float, denominator: float) -> str:
    """Their ratio; nothing over nothing is no number."""
    return format(numerator / denominator, form) if denominator else "-"


def bars(values: Sequence[float]) -> str:
    """A bar for each, the greatest as high as a line; of 0 there is a dot."""
    greatest = max(values)
    return "".join(BARS[math.ceil(value / greatest * (len(BARS) - 1)) if greatest else 0] for value in values)
