"""Pictures of one pair of axes, all of one look; needs matplotlib, which the extra `train` brings."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, RED, GREY = "#1f6f8b", "#c8553d", "#888888"


def figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """Empty axes, with a title and labels."""
    drawn = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(drawn)  # not pyplot, which would look for a display
    axes = drawn.subplots()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return drawn, axes


def save(drawn: Figure, path: Path, legend: Literal["best", "lower right"] = "best") -> Path:
    """Write the picture, with a legend at that place where there are labels."""
    for axes in drawn.axes:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, loc=legend)
    drawn.savefig(path, dpi=130)
    return path
