"""The frontier of `longcat plan`: tokens a second for a GPU over tokens a second for a user."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longcat_cli.plotting import BLUE, GREY, RED, figure, save
from longcat_core.planning.plan import Plan
from longcat_core.planning.search import frontier

LABELS = 7
"""On the frontier, so that they do not cover each other."""


def draw(points: Sequence[Plan], chosen: Plan, path: Path) -> Path:
    """points: every layout with every batch that fits.

    Raises:
        ValueError: if there is none.
    """
    if not points:
        raise ValueError("plot: no layout fits")
    deployment = chosen.deployment
    drawn, axes = figure(
        f"{deployment.model.name} on {deployment.machine}, context {deployment.context}, rates: "
        f"{deployment.rates.name}; computed",
        "tokens/s a user",
        "tokens/s a GPU",
    )
    best = frontier(points)
    axes.plot(*_axes(points), ".", color=GREY, ms=4, label="every layout and batch that fits")
    axes.plot(*_axes(best), "-o", color=BLUE, ms=5, label="frontier: layout, requests a replica")
    if chosen.fits:
        axes.plot(*_axes([chosen]), "*", color=RED, ms=12, label="this plan")
    step = max(1, -(-len(best) // LABELS))
    for plan in best[::step]:
        axes.annotate(
            f"{plan.deployment.layout}, {plan.requests:g}",
            (plan.tokens_per_second_a_user, plan.tokens_per_second_a_gpu),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set_xlim(0, 1.15 * max(each.tokens_per_second_a_user for each in points))
    axes.set_ylim(bottom=0)
    return save(drawn, path)


def _axes(plans: Sequence[Plan]) -> tuple[list[float], list[float]]:
    return [each.tokens_per_second_a_user for each in plans], [each.tokens_per_second_a_gpu for each in plans]
