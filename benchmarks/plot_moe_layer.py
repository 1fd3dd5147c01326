"""Draws `results/*/moe_layer.json` for docs/numbers.md: each engine's time over ours, by the tokens of a batch."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.record import RESULTS

ENGINES = {"vllm": "vLLM", "sglang": "SGLang, without sgl_kernel"}


def main() -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.6), constrained_layout=True)
    for axes, (engine, name) in zip(panels, ENGINES.items(), strict=True):
        record = json.loads((RESULTS / engine / "moe_layer.json").read_text())
        draw(axes, record["rows"])
        axes.set_title(f"{name}, {record['date']}", fontsize=9)
    panels[0].set_ylabel("the engine's time / ours")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"One MoE layer, 64 FFN and 32 zero experts, top 12, on {record['device']}", fontsize=9)
    figure.savefig(RESULTS / "moe_layer.png", dpi=130)


def draw(axes: Axes, rows: list[dict[str, object]]) -> None:
    for dtype, colour in (("bfloat16", "#1f6f8b"), ("float32", "#c8553d")):
        for routing, style in (("a third zero", "-"), ("no zero", ":")):
            line = [row for row in rows if (row["dtype"], row["routing"], row["experts"]) == (dtype, routing, 64)]
            label = f"{dtype}, {'a third of the choices zero experts' if style == '-' else 'no zero experts'}"
            axes.plot([r["tokens"] for r in line], [r["ratio"] for r in line], style, color=colour, label=label, lw=2)
    axes.axhline(1, color="#888888", lw=1)
    tokens = sorted({row["tokens"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, labels=[str(n) for n in tokens])
    axes.set_ylim(0, None)
    axes.set_xlabel("tokens in the batch")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
