"""The plots of a training record: what it learned, and what each mechanism did."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from examples.nano.curves import Curves
from examples.nano.settings import Settings
from longcat_cli.plotting import BLUE, GREY, RED, figure, save


def draw(record: dict[str, Any], directory: Path) -> list[Path]:
    """Write `loss.png`, `experts.png`, `balance.png`, `bits_per_byte.png`, `classes.png`, and `drafts.png` where there
    were drafts."""
    settings, curves = Settings.model_validate(record["settings"]), Curves(**record["curves"])
    paths = [
        _loss(settings, curves, directory / "loss.png"),
        _experts(settings, curves, directory / "experts.png"),
        _balance(settings, curves, directory / "balance.png"),
        _bits(record["results"], directory / "bits_per_byte.png"),
        _classes(record["results"]["classes"], settings, directory / "classes.png"),
    ]
    if any(loss is not None for loss in curves.draft_loss):
        paths.append(_drafts(settings, curves, directory / "drafts.png"))
    return paths


def smoothed(values: Sequence[float], over: int = 9) -> list[float]:
    """The mean of each value and those around it."""
    half = over // 2
    parts = [values[max(0, n - half) : n + half + 1] for n in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def shade(layer: int, layers: int) -> tuple[float, float, float, float]:
    """Deeper layers are darker."""
    return (0.12, 0.44, 0.55, 0.35 + 0.65 * (layer + 1) / layers)


def _loss(settings: Settings, curves: Curves, path: Path) -> Path:
    drawn, axes = figure("Next-token loss", "step", "nats a token")
    axes.plot(curves.step, curves.loss, color=BLUE, alpha=0.25, lw=0.8)
    axes.plot(curves.step, smoothed(curves.loss), color=BLUE, lw=1.5, label="trained on")
    axes.plot(curves.glanced, curves.held_out_loss, ".-", color=RED, lw=1.2, label="held out")
    _mark_events(settings, axes)
    axes.set_ylim(top=min(axes.get_ylim()[1], math.log(settings.model.vocab_size)))
    return save(drawn, path)


def _experts(settings: Settings, curves: Curves, path: Path) -> Path:
    held = "the PID controller holds it" if settings.zero_experts.controlled else "nothing holds it"
    drawn, axes = figure(f"FFN experts a token: {held}", "step", f"mean of {settings.model.moe_topk} choices")
    _by_layer(axes, curves.step, curves.ffn_experts)
    axes.axhline(settings.zero_experts.target, color=RED, lw=1, ls="--", label="target")
    _mark_events(settings, axes)
    return save(drawn, path)


def _balance(settings: Settings, curves: Curves, path: Path) -> Path:
    drawn, axes = figure("Balance of the FFN experts", "step", "busiest over mean")
    worst = [max(layers) for layers in curves.imbalance]
    devices = [max(layers) for layers in curves.device_imbalance]
    on = {True: "on", False: "off"}
    axes.plot(
        curves.step, smoothed(worst), color=BLUE, label=f"expert (bias update {on[settings.bias_balance.enabled]})"
    )
    label = f"device of {settings.device_balance.devices} (balance loss {on[settings.device_balance.enabled]})"
    axes.plot(curves.step, smoothed(devices), color=RED, label=label)
    axes.axhline(1.0, color=GREY, lw=0.8)
    _mark_events(settings, axes)
    axes.set_ylim(bottom=0.9)
    return save(drawn, path)


def _drafts(settings: Settings, curves: Curves, path: Path) -> Path:
    drawn, axes = figure("The draft layer, added late", "step", "nats a token")
    pairs = [(s, loss) for s, loss in zip(curves.step, curves.draft_loss, strict=True) if loss is not None]
    axes.plot(
        [s for s, _ in pairs],
        smoothed([loss for _, loss in pairs]),
        color=BLUE,
        label="first draft, against what the model would say",
    )
    axes.plot(curves.step, smoothed(curves.loss), color=GREY, lw=1, label="the model, against the text")
    right = axes.twinx()
    right.spines["top"].set_visible(False)
    right.set_ylabel("share of drafts that the model would say too")
    right.set_ylim(0, 1)
    seen = [(s, a) for s, a in zip(curves.glanced, curves.agreement, strict=True) if a is not None]
    axes.plot([], [], ".-", color=RED, label="agreement on held-out text")
    right.plot([s for s, _ in seen], [a for _, a in seen], ".-", color=RED)
    axes.set_ylim(top=min(axes.get_ylim()[1], math.log(settings.model.vocab_size)))
    return save(drawn, path)


def _bits(results: dict[str, Any], path: Path) -> Path:
    drawn, axes = figure("Bits a byte on held-out files", "", "bits a byte")
    names = {
        "bits_per_byte_of_a_byte_bigram": "byte bigram",
        "bits_per_byte_of_gzip": "gzip -9",
        "bits_per_byte": "Nano",
    }
    bars = axes.bar(list(names.values()), [results[key] for key in names], color=[GREY, GREY, BLUE], width=0.6)
    axes.bar_label(bars, fmt="%.2f", fontsize=9)
    return save(drawn, path)


def _classes(classes: dict[str, Any], settings: Settings, path: Path) -> Path:
    drawn, axes = figure("What the router spends on a token, by its class", "FFN experts a token and layer", "")
    names = sorted(classes, key=lambda name: -classes[name]["predicted"]["mean"])
    for key, colour, label in (("predicted", BLUE, "where one is to come"), ("read", RED, "where one is read")):
        means, errors = ([classes[name][key][what] for name in names] for what in ("mean", "error"))
        axes.errorbar(means, names, xerr=errors, fmt="o", ms=6, color=colour, capsize=2, label=label)
    if settings.zero_experts.controlled:
        axes.axvline(settings.zero_experts.target, color=GREY, lw=0.8, ls="--", label="target of the mean")
    return save(drawn, path)


def _by_layer(axes: Axes, steps: Sequence[int], values: Sequence[Sequence[float]]) -> None:
    """A line a layer; layers that a growth added begin where they do."""
    layers = max(len(each) for each in values)
    for layer in range(layers):
        line = [(s, each[layer]) for s, each in zip(steps, values, strict=True) if len(each) > layer]
        axes.plot([s for s, _ in line], [v for _, v in line], color=shade(layer, layers), lw=1, label=f"layer {layer}")


def _mark_events(settings: Settings, axes: Axes) -> None:
    events = [(settings.grows_at, "grows"), (settings.drafts_from, "draft layer")]
    for step, name in events:
        if step:
            axes.axvline(step, color=GREY, lw=0.8, ls=":")
            axes.text(
                step, 0.98, name, transform=axes.get_xaxis_transform(), rotation=90, fontsize=7, color=GREY, va="top"
            )
