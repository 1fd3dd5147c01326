"""What `longcat inspect` shows of an inspection: colours, figures, and the page."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
import torch
from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.inspection import Inspection
from longcat_core.layers.routing import relative_load

_FEW, _MANY = (0xE9, 0xF1, 0xF2), (0x0B, 0x4F, 0x63)
"""The ends of the scale."""
_STEPS = 5
_BINS = 32


class Shade(NamedTuple):
    """Colours as `#rrggbb`."""

    background: str
    text: str


@dataclass(frozen=True)
class Colours:
    """The darker a token, the greater its number: of FFN experts that it takes, or of those that are taken away."""

    counts: Tensor
    """int64 [layers, T]."""

    def values(self, layer: int | None) -> Tensor:
        """fp64 [T]: the number of each token in one layer, or the mean over all."""
        counts = self.counts.double()
        return counts.mean(dim=0) if layer is None else counts[layer]

    def shades(self, layer: int | None) -> list[Shade]:
        low, high = self._ends(layer)
        return [_shade((value - low) / (high - low)) for value in self.values(layer).tolist()]

    def scale(self, layer: int | None) -> list[tuple[str, Shade]]:
        """Some values from the lightest shade to the darkest, with decimals enough to tell how far they are apart."""
        low, high = self._ends(layer)
        shares = [step / (_STEPS - 1) for step in range(_STEPS)]
        values = [low + share * (high - low) for share in shares]
        within = (high - low) / (_STEPS - 1) / 10
        decimals = next(n for n in itertools.count() if all(abs(round(value, n) - value) < within for value in values))
        return [(f"{value:.{decimals}f}", _shade(share)) for value, share in zip(values, shares, strict=True)]

    def _ends(self, layer: int | None) -> tuple[float, float]:
        """Of the scale: the 2nd and the 98th percentile of the tokens, so that one token does not flatten the colours
        of all others."""
        low, high = torch.quantile(self.values(layer), torch.tensor([0.02, 0.98], dtype=torch.float64)).tolist()
        return (low, high) if high > low else (low, low + 1)


class Held(NamedTuple):
    """The same text, where every layer's mean of FFN experts is held at a target."""

    target: float
    inspection: Inspection
    biases: list[float]
    """Of a zero expert, by layer."""


@dataclass(frozen=True)
class Report:
    checkpoint: str
    text: str
    """Names, for people."""
    config: LongcatConfig
    inspection: Inspection
    pieces: list[str]
    """The text, token by token."""
    total_tokens: int
    """Of the whole text, of which the first were read."""
    held: Held | None = None

    @property
    def taken(self) -> Colours:
        """By FFN experts."""
        return Colours(self.inspection.ffn_experts)

    @property
    def taken_away(self) -> Colours | None:
        """By how many of them a token loses where the mean is held; less than none where it wins some."""
        if self.held is None:
            return None
        return Colours(self.inspection.ffn_experts - self.held.inspection.ffn_experts)

    def shown_pieces(self) -> list[str]:
        """The pieces, with visible ends of lines, as these are tokens like others."""
        return [piece.replace("\r", "␍").replace("\n", "⏎\n") for piece in self.pieces]

    # -- figures -----------------------------------------------------------------------------------------

    def facts(self) -> list[tuple[str, str]]:
        config, found = self.config, self.inspection
        read = f"{len(found.tokens):,}"
        if self.total_tokens > len(found.tokens):
            read += f", the first of {self.total_tokens:,}"
        by_layer = found.ffn_experts.double().mean(dim=1)
        activated = found.activated_parameters(config)
        low, high = torch.quantile(activated, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
        busiest = relative_load(found.load).amax(dim=1).tolist()
        return [
            ("tokens", read),
            ("FFN experts a token", f"mean {by_layer.mean():.2f} of {config.moe_topk} choices, the rest zero experts"),
            ("by layer", ", ".join(f"{n}: {mean:.2f}" for n, mean in enumerate(by_layer.tolist()))),
            ("activated parameters", f"mean {si(float(activated.mean()))}, p5 {si(low)}, p95 {si(high)}"),
            (
                "busiest FFN expert",
                ", ".join(f"{n}: {times:.1f}" for n, times in enumerate(busiest)) + " times the mean",
            ),
            ("drafts accepted", _drafts_accepted(found)),
            *self._facts_where_held(),
        ]

    def _facts_where_held(self) -> list[tuple[str, str]]:
        if self.held is None or self.taken_away is None:
            return []
        found, lost = self.held.inspection, self.taken_away.values(None)
        low, high = torch.quantile(lost, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
        activated = float(found.activated_parameters(self.config).mean())
        nats = [float(each.nats[1:].mean()) for each in (found, self.inspection)]
        return [
            (f"held at {self.held.target:g}", f"mean {found.ffn_experts.double().mean():.2f} in every layer"),
            ("taken from a token", f"mean {lost.mean():.2f}, p5 {low:.2f}, p95 {high:.2f} FFN experts"),
            ("parameters then", f"mean {si(activated)}"),
            ("nats a token then", f"{nats[0]:.3f}, as published {nats[1]:.3f}" if len(lost) > 1 else "one token"),
            ("drafts accepted then", _drafts_accepted(found)),
            ("zero experts' bias", ", ".join(f"{n}: {bias:+.3g}" for n, bias in enumerate(self.held.biases))),
        ]

    # -- the page ----------------------------------------------------------------------------------------

    def page(self) -> str:
        """HTML that needs no other file and no network."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("longcat_cli", "."), autoescape=True, undefined=jinja2.StrictUndefined
        )
        views: dict[str, tuple[Colours, int | None]] = {"mean": (self.taken, None)}
        if self.taken_away is not None:
            views["taken away"] = (self.taken_away, None)
        views |= {f"layer {n}": (self.taken, n) for n in range(self.config.num_layers)}
        return environment.get_template("inspection.html.jinja").render(
            report=self,
            tokens=self._tokens(),
            views={
                name: {"shades": colours.shades(layer), "scale": colours.scale(layer)}
                for name, (colours, layer) in views.items()
            },
            layers=self._layers(),
            histogram=self._histogram(),
        )

    def _tokens(self) -> list[dict[str, Any]]:
        found = self.inspection
        activated = found.activated_parameters(self.config).tolist()
        experts = found.ffn_experts.T.tolist()
        held = None if self.held is None else self.held.inspection.ffn_experts.T.tolist()
        tokens = []
        for place, (piece, shown) in enumerate(zip(self.pieces, self.shown_pieces(), strict=True)):
            drafted = found.drafts is not None and place >= 2
            accepted = bool(found.drafts[place]) if found.drafts is not None else False
            numbers = f"{piece!r}: FFN experts {_by_layer(experts[place])}; {si(activated[place])} parameters"
            if self.held is not None and held is not None:
                numbers += f"; held at {self.held.target:g}: {_by_layer(held[place])}"
            if place > 0:
                numbers += f"; {found.nats[place]:.2f} nats"
            if drafted:
                numbers += f"; draft {'accepted' if accepted else 'rejected'}"
            draft = ("accepted" if accepted else "rejected") if drafted else "none"
            tokens.append({"piece": shown, "numbers": numbers, "draft": draft})
        return tokens

    def _layers(self) -> list[dict[str, Any]]:
        """By layer: the mean of FFN experts, and each one's load over the mean load."""
        means = self.inspection.ffn_experts.double().mean(dim=1).tolist()
        loads = relative_load(self.inspection.load).tolist()
        return [{"ffn_experts": mean, "load": load} for mean, load in zip(means, loads, strict=True)]

    def _histogram(self) -> dict[str, Any]:
        activated = self.inspection.activated_parameters(self.config)
        ends = [self.config.activated_parameters(count) for count in (0, self.config.moe_topk)]
        # By the number of FFN experts in all layers, as many of those numbers to every bar.
        most = self.config.num_layers * self.config.moe_topk
        each = math.ceil((most + 1) / _BINS)
        counts = torch.bincount(self.inspection.ffn_experts.sum(dim=0) // each, minlength=most // each + 1)
        slack = (ends[1] - ends[0]) / most
        first, last = ends[0] - slack / 2, ends[0] + (len(counts) * each - 0.5) * slack
        marks = torch.quantile(activated, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
        places = {"p5": marks[0], "mean": float(activated.mean()), "p95": marks[1]}
        return {
            "bars": (counts / counts.max()).tolist(),
            "ends": [si(end) for end in ends],
            "marks": {name: ((at - first) / (last - first), si(at)) for name, at in places.items()},
        }


def _by_layer(counts: list[int]) -> str:
    return ", ".join(f"layer {n}: {count}" for n, count in enumerate(counts))


def _drafts_accepted(found: Inspection) -> str:
    if found.drafts is None:
        return "no draft layer (MTP)"
    acceptance = found.draft_acceptance()
    return "no drafts" if acceptance is None else f"{acceptance:.1%}"


def pieces(text: str, offsets: Sequence[tuple[int, int]]) -> list[str]:
    """The part of the text that each token stands for; together they are the text as far as it was read.

    A character of several tokens is given to the first of them; what no token stands for goes before the next one.
    """
    parts, end = [], 0
    for _, stop in offsets:
        parts.append(text[end : max(end, stop)])
        end = max(end, stop)
    return parts


def si(number: float) -> str:
    """`31.3 B`, `4.02 M`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:  # what three digits round up to it
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _shade(share: float) -> Shade:
    share = min(max(share, 0.0), 1.0)
    channels = [round(few + share * (many - few)) for few, many in zip(_FEW, _MANY, strict=True)]
    # Whichever letters have the more contrast: the grounds meet both alike at a luminance of 0.18 (WCAG 2).
    linear = [(each / 255 / 12.92) if each <= 10 else ((each / 255 + 0.055) / 1.055) ** 2.4 for each in channels]
    luminance = sum(weight * each for weight, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return Shade("#" + "".join(f"{each:02x}" for each in channels), "#ffffff" if luminance < 0.18 else "#000000")
