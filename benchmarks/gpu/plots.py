"""The picture of a measurement: the MoE layer's times over their floor, and the engine's time over ours."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.gpu.measured import Measured, MoeSetting

COLOURS = {"ours": "#1f6f8b", "vLLM, dropped": "#e09f3e", "vLLM, remapped": "#c8553d", "ours, remapped": "#8fb8c6"}
MOST_SETTINGS = 4


def draw(measured: Measured, file: Path) -> bool:
    """Two panels for each of the first settings with random routing. False if there is nothing to draw."""
    settings = [setting for setting in measured.moe_settings() if setting.routing == "random"]
    settings = [setting for setting in settings if any("result" in row for row in setting.rows)][:MOST_SETTINGS]
    if not settings:
        return False
    height = 3.0 * len(settings) + 0.5
    figure, panels = plt.subplots(len(settings), 2, figsize=(10, height), constrained_layout=True, squeeze=False)
    for (left, right), setting in zip(panels, settings, strict=True):
        _times(left, setting)
        _ratios(right, setting)
    panels[0][0].legend(frameon=False, fontsize=8)
    panels[0][1].legend(frameon=False, fontsize=8)
    record = measured.record
    note = ": tiny sizes, interpreted; the times mean nothing" if record["is_tiny"] else ""
    figure.suptitle(f"One MoE layer on {record['device']}, {record['date'][:10]}{note}", fontsize=10)
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return True


def _times(axes: Axes, setting: MoeSetting) -> None:
    for kernel in setting.kernels:
        points = [(tokens, us) for tokens in setting.tokens if (us := setting.us(kernel, tokens)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[kernel], label=kernel, lw=1.8, ms=3)
    floor = [(tokens, us) for tokens in setting.tokens if (us := setting.floor_us(tokens)) is not None]
    if floor:
        axes.plot(*zip(*floor, strict=True), "--", color="#555555", label="floor", lw=1.2)
    axes.set_yscale("log")
    axes.set_ylabel("us")
    _tokens(axes, setting)
    axes.set_title(setting.name, fontsize=8)


def _ratios(axes: Axes, setting: MoeSetting) -> None:
    for kernel in ("vLLM, remapped", "vLLM, dropped", "ours, remapped"):
        points = []
        for tokens in setting.tokens:
            theirs, ours = setting.us(kernel, tokens), setting.us("ours", tokens)
            if theirs is not None and ours:
                points.append((tokens, theirs / ours))
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[kernel], label=f"{kernel} / ours", lw=1.8, ms=3)
    axes.axhline(1, color="#888888", lw=1)
    axes.set_ylim(0, None)
    _tokens(axes, setting)
    axes.set_title("time over ours", fontsize=8)


def _tokens(axes: Axes, setting: MoeSetting) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(setting.tokens, labels=[str(tokens) for tokens in setting.tokens], fontsize=7)
    axes.minorticks_off()
    axes.set_xlabel("tokens", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
