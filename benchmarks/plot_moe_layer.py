"""Draws `results/moe_layer.json` for the README: vLLM's time over ours, by the tokens of a batch."""

from __future__ import annotations

import json

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.record import RESULTS


def main() -> None:
    record = json.loads((RESULTS / "moe_layer.json").read_text())
    figure, axes = plt.subplots(figsize=(7.5, 3.6), constrained_layout=True)
    styles = {"a third zero": "-", "no zero": ":"}
    for dtype, colour in (("bfloat16", "#1f6f8b"), ("float32", "#c8553d")):
        for routing, style in styles.items():
            rows = [
                row for row in record["rows"] if (row["dtype"], row["routing"], row["experts"]) == (dtype, routing, 64)
            ]
            label = f"{dtype}, {'a third of the slots zero experts' if style == '-' else 'no zero experts'}"
            axes.plot([r["tokens"] for r in rows], [r["ratio"] for r in rows], style, color=colour, label=label, lw=2)
    axes.axhline(1, color="#888888", lw=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        [1, 2, 4, 8, 16, 32, 64, 128, 256, 512], labels=["1", "2", "4", "8", "16", "32", "64", "128", "256", "512"]
    )
    axes.set_ylim(0, None)
    axes.set_xlabel("tokens in the batch")
    axes.set_ylabel("vLLM's time / ours")
    axes.set_title(
        f"One MoE layer, 64 FFN and 32 zero experts, top 12\n{record['device']}, {record['date']}", fontsize=9
    )
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "moe_layer.png", dpi=130)


if __name__ == "__main__":
    main()
