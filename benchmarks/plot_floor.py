"""Draws `results/*/floor.json` for docs/numbers.md: the share of its floor that each decode step and prompt reaches."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from benchmarks.record import RESULTS

ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}
CONTEXTS = {128: "#1f6f8b", 2048: "#c8553d", 8192: "#6a994e", 32768: "#8d6cab"}
RUNS = {"compiled": "-", "eager": "--"}
BESIDE = {"HTTP": "*", "transformers": "x", "mlx-lm, fp32": "+"}
PROMPTS = {512: "#d9b382", 4096: "#8c6d3f"}
Row = dict[str, Any]


def main() -> None:
    files = {engine: RESULTS / engine / "floor.json" for engine in ENGINES}
    records = {engine: json.loads(file.read_text()) for engine, file in files.items() if file.exists()}
    models = list(dict.fromkeys(row["model"] for record in records.values() for row in record["rows"]))
    figure, panels = plt.subplots(
        len(records), len(models) + 1, figsize=(13, 3.4 * len(records)), squeeze=False, layout="constrained"
    )
    for (engine, record), axes in zip(records.items(), panels, strict=True):
        for model, panel in zip(models, axes, strict=False):
            draw_decoding(panel, [row for row in record["rows"] if row["model"] == model and row["pass"] == "decode"])
            panel.set_title(f"{ENGINES[engine]}, {model}", fontsize=9)
        draw_prompts(axes[-1], [row for row in record["rows"] if row["pass"] == "prefill"], models)
        axes[-1].set_title(f"{ENGINES[engine]}, prompts", fontsize=9)
        axes[0].set_ylabel("floor / time")
    figure.legend(handles=legend(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    title = ", ".join(f"{ENGINES[engine]} {record['date']} on {record['device']}" for engine, record in records.items())
    figure.suptitle(f"Decode steps and prompts over their floors: {title}", fontsize=9)
    figure.savefig(RESULTS / "floor.png", dpi=130)


def draw_decoding(axes: Axes, rows: list[Row]) -> None:
    for context, colour in CONTEXTS.items():
        for run, style in RUNS.items():
            line = [row for row in rows if (row["run"], row["context"]) == (run, context)]
            axes.plot(*points(line), style, color=colour, marker="o", ms=3, lw=1.6)
    for run, marker in BESIDE.items():
        axes.plot(*points([row for row in rows if row["run"] == run]), marker, color="#333333", ms=7)
    requests = sorted({row["requests"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(requests, labels=[str(n) for n in requests])
    axes.set_xlabel("requests")
    finish(axes)


def points(rows: list[Row]) -> tuple[list[int], list[float]]:
    return [row["requests"] for row in rows], [row["fraction"] for row in rows]


def draw_prompts(axes: Axes, rows: list[Row], models: list[str]) -> None:
    runs = [run for run in reversed(RUNS) if any(row["run"] == run for row in rows)]
    width = 0.8 / (len(PROMPTS) * len(runs))
    for row in rows:
        place = runs.index(row["run"]) * len(PROMPTS) + list(PROMPTS).index(row["context"])
        left = models.index(row["model"]) - 0.4 + place * width
        hatch = "" if row["run"] == "compiled" else "////"
        axes.bar(left, row["fraction"], width, align="edge", color=PROMPTS[row["context"]], hatch=hatch, ec="white")
    axes.set_xticks(range(len(models)), labels=models)
    finish(axes)


def finish(axes: Axes) -> None:
    axes.axhline(1, color="#888888", lw=1)
    axes.set_ylim(0, max(1.05, axes.get_ylim()[1]))
    axes.spines[["top", "right"]].set_visible(False)


def legend() -> list[Any]:
    contexts = [Line2D([], [], color=colour, label=f"context {context:,}") for context, colour in CONTEXTS.items()]
    runs = [Line2D([], [], color="#333333", ls=style, label=run) for run, style in RUNS.items()]
    beside = [
        Line2D([], [], color="#333333", ls="", marker=marker, label=f"{run}, context 128")
        for run, marker in BESIDE.items()
    ]
    prompts = [
        Line2D([], [], color=colour, ls="", marker="s", ms=8, label=f"prompt of {tokens:,}; hatched: eager")
        for tokens, colour in PROMPTS.items()
    ]
    return [*contexts, *runs, *beside, *prompts]


if __name__ == "__main__":
    main()
