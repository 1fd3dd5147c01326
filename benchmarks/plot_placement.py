"""Draws `results/*/placement.json` for docs/numbers.md: the busiest rank over the mean, and what was moved."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.record import RESULTS

COLOURS = {"linear": "#bbbbbb", "vLLM": "#6a994e", "SGLang vec": "#d9b382", "ours": "#1f6f8b", "ours, 1/16": "#c8553d"}
LABELS = {"vLLM": "default of vLLM and SGLang", "SGLang vec": "SGLang's deepseek_vec"}
"""SGLang's default is the algorithm of vLLM's; they differ by chance."""
CASES = [(8, 32), (32, 32), (128, 0), (128, 32), (320, 128)]
WIDTH = 0.8 / len(COLOURS)
Row = dict[str, Any]


def main() -> None:
    records = [json.loads((RESULTS / engine / "placement.json").read_text()) for engine in ("vllm", "sglang")]
    rows = unique([row for record in records for row in record["rows"]])
    routings = [name for name in dict.fromkeys(row["routing"] for row in rows) if name != "Nano"]
    figure, panels = plt.subplots(2, len(routings), figsize=(13, 6.4), layout="constrained", sharey="row")
    for name, (above, below) in zip(routings, panels.T, strict=True):
        of_routing = [row for row in rows if row["routing"] == name]
        draw_busiest(above, of_routing)
        draw_received(below, of_routing)
        above.set_title(name, fontsize=9)
    panels[0, 0].set_ylabel("busiest rank's rows over the mean")
    panels[1, 0].set_ylabel("GB received by a rank in a rebalancing")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    figure.suptitle(
        f"512 experts, simulated {records[0]['date']}; bars: mean of the steps, lines: to p99; linear is cut at 2.6",
        fontsize=9,
    )
    figure.savefig(RESULTS / "placement.png", dpi=130)


def unique(rows: list[Row]) -> list[Row]:
    """One for each case and policy: those that both records have were counted alike."""
    return list({(row["routing"], row["ranks"], row["redundant"], row["policy"]): row for row in rows}.values())


def draw_busiest(axes: Axes, rows: list[Row]) -> None:
    for policy, place, row in bars(rows):
        label = LABELS.get(policy, policy) if row["ranks"] == 8 else None
        axes.bar(place, row["mean"] - 1, WIDTH, 1, color=COLOURS[policy], label=label)
        axes.plot([place, place], [row["mean"], row["p99"]], color="#333333", lw=0.8)
    for number, case in enumerate(CASES):
        chance = next(r for r in rows if (r["ranks"], r["redundant"], r["policy"]) == (*case, "chance"))
        label = None if number else "chance alone"
        axes.hlines(chance["mean"], number - 0.45, number + 0.45, color="#000000", lw=1.2, label=label)
    axes.set_ylim(1, 2.6)
    finish(axes)


def draw_received(axes: Axes, rows: list[Row]) -> None:
    for policy, place, row in bars(rows):
        axes.bar(place, row["GB received a rank"], WIDTH, color=COLOURS[policy])
    axes.set_yscale("log")
    axes.set_xlabel("ranks + redundant experts")
    finish(axes)


def bars(rows: list[Row]) -> list[tuple[str, float, Row]]:
    """Policy, place on the axis, and the row."""
    return [
        (row["policy"], CASES.index(case) - 0.4 + (list(COLOURS).index(row["policy"]) + 0.5) * WIDTH, row)
        for row in rows
        if row["policy"] in COLOURS and (case := (row["ranks"], row["redundant"])) in CASES
    ]


def finish(axes: Axes) -> None:
    axes.set_xticks(range(len(CASES)), labels=[f"{ranks}+{redundant}" for ranks, redundant in CASES], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
