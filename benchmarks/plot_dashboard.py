"""Draws `docs/dashboard.png`: the dashboard of examples/grafana, from Prometheus' answers while a stock server works.

It serves LongCat-Nano on two ranks that share experts, with drafts and their gate, so that no panel is empty. The load
changes twice: in its number of requests at once, then from code to prose. That shows what there is to see, and measures
no speed. Needs Prometheus.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import random
import re
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from benchmarks import record
from longcat_nano import CHECKPOINT
from tests.harness import engine
from tests.prometheus import DASHBOARD, Series, queries, scraping
from tests.requests import COMPLETIONS, MODEL
from tests.server import Server, serving

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "dashboard.png"
RANKS, DRAFT_TOKENS, NEW_TOKENS, PROMPT_CHARACTERS = 2, 3, 64, 400
WINDOW_S = 10
"""Over which rates are taken."""
COLUMNS = 3


class Phase(NamedTuple):
    title: str
    at_once: int
    source: str
    """A file, parts of which are the prompts."""
    seconds: float = 30


WARM_UP = Phase("", 4, "longcat_core/config.py", seconds=10)
PHASES = (
    Phase("code, 1 request", 1, "longcat_core/config.py"),
    Phase("code, 4 requests", 4, "longcat_core/config.py"),
    Phase("prose, 4 requests", 4, "docs/nano.md"),
)


def main() -> None:
    os.environ.update(engine.environment_of_ranks(RANKS))
    flags = [*engine.expert_parallel_flags(RANKS), *engine.speculation_flags(DRAFT_TOKENS), *engine.GATED_FLAGS]
    command = [*engine.command(CHECKPOINT, served_name=MODEL, max_model_len=1024, cache_tokens=16384), *flags]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with serving(command, folder / "server.log") as server, scraping(server, folder) as prometheus:
            load(server, WARM_UP)
            time.sleep(WINDOW_S)
            began = [time.time()]
            for phase in PHASES:
                load(server, phase)
                began.append(time.time())
            seconds = began[-1] - began[0]
            answers: dict[str, dict[str, list[Series]]] = {}
            for query in queries(f"{WINDOW_S}s"):
                answers.setdefault(query.panel, {})[query.legend] = prometheus.ask_range(query.expression, seconds)
    draw(answers, began)
    print(PICTURE)


def load(server: Server, phase: Phase) -> None:
    """So many clients that each ask again when they have been answered."""
    text, deadline = (ROOT / phase.source).read_text(), time.monotonic() + phase.seconds

    def ask(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < deadline:
            start = chance.randrange(len(text) - PROMPT_CHARACTERS)
            request = {"model": MODEL, "prompt": text[start : start + PROMPT_CHARACTERS], "max_tokens": NEW_TOKENS}
            server.http.post(COMPLETIONS, json={**request, "temperature": 0.8, "seed": seed}).raise_for_status()

    with ThreadPoolExecutor() as pool:
        list(pool.map(ask, range(phase.at_once)))


def draw(answers: dict[str, dict[str, list[Series]]], began: Sequence[float]) -> None:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    rows = -(-len(panels) // COLUMNS)
    figure, all_axes = plt.subplots(rows, COLUMNS, figsize=(13, 2.7 * rows), layout="constrained", sharex=True)
    for panel, axes in zip(panels, all_axes.flat, strict=False):
        by_legend = answers[panel["title"]]
        if panel["type"] == "heatmap":
            draw_heatmap(axes, next(iter(by_legend.values())), began[0])
        else:
            draw_lines(axes, by_legend, began[0])
            if panel["fieldConfig"]["defaults"]["unit"] == "percentunit":
                axes.yaxis.set_major_formatter(PercentFormatter(1))
        for change in began[1:-1]:
            axes.axvline(change - began[0], color="#bbbbbb", lw=0.8, zorder=0)
        axes.set_title(panel["title"], fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in all_axes.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in all_axes.flat[len(panels) - COLUMNS : len(panels)]:
        axes.set_xlabel("seconds")
        axes.xaxis.set_tick_params(labelbottom=True)
    first = all_axes[0, 0]
    first.set_ylim(top=1.2 * first.get_ylim()[1])
    for (start, end), phase in zip(pairwise(began), PHASES, strict=True):
        place = ((start + end) / 2 - began[0], 1)
        first.annotate(phase.title, place, xycoords=("data", "axes fraction"), fontsize=7, ha="center", va="top")
    where = record.environment()
    figure.suptitle(
        f"LongCat-Nano in {engine.NAME} {where['versions'][record.ENGINE]}, 2 ranks, drafts with a gate; "
        f"{where['date']}, {where['device']}; rates over {WINDOW_S} s",
        fontsize=9,
    )
    figure.savefig(PICTURE, dpi=110)


def draw_lines(axes: Axes, by_legend: dict[str, list[Series]], began: float) -> None:
    for legend, found in by_legend.items():
        for series in found:
            label = named(legend, series.labels)
            seconds, values = zip(*series.points, strict=True)
            axes.plot([second - began for second in seconds], values, lw=1.2, label=label or None)
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=7)


def named(legend: str, labels: dict[str, str]) -> str:
    """The legend with its labels filled in, but for that of the one server."""
    return re.sub(r"{{(\w+)}}", lambda name: "" if name[1] == "instance" else labels[name[1]], legend).strip()


def draw_heatmap(axes: Axes, buckets: Sequence[Series], began: float) -> None:
    """Buckets count all that is not above their bound."""
    ordered = sorted(buckets, key=lambda series: float(series.labels["le"]))[:-1]
    cumulative = [[0.0] * len(ordered[0].points), *([value for _, value in series.points] for series in ordered)]
    tokens = [[high - low for low, high in zip(*both, strict=True)] for both in pairwise(cumulative)]
    seconds = [second - began for second, _ in ordered[0].points]
    axes.pcolormesh(seconds, range(len(tokens)), tokens, cmap="Blues", shading="nearest")


if __name__ == "__main__":
    main()
