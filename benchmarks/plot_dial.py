"""Draws `results/*/dial_speed.json` over `results/dial.json`: what a target of the dial costs, and what it brings."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json

from benchmarks.bench_dial import RESULT
from benchmarks.bench_dial_speed import AT_ONCE, WITHOUT
from benchmarks.record import RESULTS
from longcat_cli.plotting import BLUE, RED, figure, save

REQUESTS = max(AT_ONCE)
ENGINES = {"vllm": ("vLLM", BLUE), "sglang": ("SGLang", RED)}


def main() -> None:
    of_targets = {row["target"]: row["bits_per_byte"] for row in json.loads(RESULT.read_text())["frontier"]}
    bits = {WITHOUT: of_targets.pop("published")} | {f"{target:.3g}": value for target, value in of_targets.items()}
    drawn, axes = figure(
        "LongCat-Nano with a dial at 1 to 4 FFN experts a token",
        f"tokens/s of {REQUESTS} requests, over those without a dial (lines: least to greatest)",
        "bits a byte, held out",
    )
    for directory, (name, colour) in ENGINES.items():
        rows = json.loads((RESULTS / directory / "dial_speed.json").read_text())["rows"]
        for row in rows:
            at, height = row[f"ratio at {REQUESTS}"], bits[row["target"]]
            axes.plot(
                [float(end) for end in row[f"ratios at {REQUESTS}"].split(" to ")], [height] * 2, color=colour, lw=0.8
            )
            axes.annotate(row["target"], (at, height), (0, 4), textcoords="offset points", fontsize=7, ha="center")
        points = [(row[f"ratio at {REQUESTS}"], bits[row["target"]]) for row in rows]
        axes.plot(*zip(*points, strict=True), "o", color=colour, ms=4, label=name)
    print(save(drawn, RESULTS / "dial_speed.png"))


if __name__ == "__main__":
    main()
