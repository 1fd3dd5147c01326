"""What `longcat quantize` says of a model: a table of its kinds of layers, what is kept in bf16, and a plot."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.filesize import decimal
from rich.table import Table

from longcat_core.recipe.calibration import Measured
from longcat_core.recipe.conversion import Bytes, Conversion, Source
from longcat_core.recipe.layers import Layer
from longcat_core.recipe.rule import Score

_NEVER = "all that is never in FP8"
_SHOWN = 8
"""Names of experts."""


class Report:
    """measured, scores: empty where nothing is measured."""

    def __init__(
        self,
        source: Source,
        conversion: Conversion,
        measured: Mapping[str, Measured],
        scores: Mapping[str, Score],
    ) -> None:
        self._source, self._conversion, self._measured, self._scores = source, conversion, measured, scores
        self._layers = source.layers
        self._kept = {layer.name for layer in conversion.ignored}

    def sizes(self) -> Table:
        """By kind of layer: bytes before and after, and what it would take more to keep them."""
        table = _table("kind of layer", "linear layers", "before", "after", "more if kept")
        more: dict[str, int] = {}
        for layer in self._layers:
            extra = 0 if layer.name in self._kept else self._source.extra_bytes(layer)
            more[layer.kind] = more.get(layer.kind, 0) + extra
        by_kind = self._conversion.bytes_by_kind()
        for kind, size in by_kind.items():
            count = sum(layer.kind == kind for layer in self._layers)
            cells = (str(count), decimal(more[kind])) if kind else ("", "")
            table.add_row(kind or _NEVER, cells[0], decimal(size.before), decimal(size.after), cells[1])
        table.add_section()
        total = sum(by_kind.values(), Bytes())
        sizes = (total.before, total.after, sum(more.values()))
        table.add_row("all", str(len(self._layers)), *map(decimal, sizes))
        return table

    def measurements(self) -> Table:
        """By kind of layer: the greatest values, how many layers are in each list, and what that comes to."""
        table = _table(
            "kind of layer",
            "linear\nlayers",
            "largest\ninput",
            "largest error\nof weights",
            "largest error\nof outputs",
            "with extreme\ninputs",
            "with a\nlarge error",
            "kept\nin bf16",
            "before",
            "after",
        )
        by_kind = self._conversion.bytes_by_kind()
        for kind, size in by_kind.items():
            if kind:
                layers = [layer for layer in self._layers if layer.kind == kind]
                table.add_row(kind, *self._cells(layers), decimal(size.before), decimal(size.after))
            else:
                table.add_row(_NEVER, *[""] * 7, decimal(size.before), decimal(size.after))
        table.add_section()
        total = sum(by_kind.values(), Bytes())
        table.add_row("all", *self._cells(self._layers), decimal(total.before), decimal(total.after))
        return table

    def _cells(self, layers: Sequence[Layer]) -> list[str]:
        names = [layer.name for layer in layers]
        kept = str(sum(name in self._kept for name in names))
        measured = [self._measured[name] for name in names if name in self._measured]
        if not measured:  # a draft layer, of a text of one token
            return [str(len(names)), "", "", "", "", "", kept]
        scores = [self._scores[name] for name in names if name in self._scores]
        return [
            str(len(names)),
            f"{max(each.largest_input for each in measured):.4g}",
            f"{max(each.weight_error for each in measured):.1%}",
            f"{max(each.output_error for each in measured):.1%}",
            str(sum(score.is_extreme for score in scores)) if scores else "",
            str(sum(score.is_large for score in scores)) if scores else "",
            kept,
        ]

    def remarks(self) -> Iterator[str]:
        """Lines below the table."""
        groups = dict.fromkeys(layer.group for layer in self._conversion.ignored)
        yield f"kept in bf16: {', '.join(groups) or 'no linear layer'}"
        experts = [name.removesuffix(".down_proj") for name in self._measured if name.endswith(".down_proj")]
        experts = [name for name in experts if ".experts." in name]
        unreached = [name for name in experts if not self._measured[f"{name}.down_proj"].rows]
        if unreached:
            more = f" and {len(unreached) - _SHOWN} more" if len(unreached) > _SHOWN else ""
            yield (
                f"no token of the text took {len(unreached)} of {len(experts)} experts, which are judged by the "
                f"error of their weights alone; a longer or more varied text takes more: "
                f"{', '.join(unreached[:_SHOWN])}{more}"
            )
        yield from self._conversion.cautions()

    def plot(self, path: Path) -> Path:
        """Every linear layer by its largest input and its error; experts that no token reached are left out."""
        from longcat_cli.plotting import BLUE, GREY, RED, figure, save

        title = "Linear layers in FP8; upper right: extreme inputs and a large error"
        drawn, axes = figure(title, "largest input / threshold", "error / threshold")
        parts = {"experts": GREY, "attention": BLUE, "dense FFN": RED}
        for part, colour in parts.items():
            points = self._points(part, kept=False)
            if points[0]:
                axes.plot(*points, ".", color=colour, ms=5, label=f"{part}, FP8")
        for part, colour in parts.items():
            points = self._points(part, kept=True)
            if points[0]:
                axes.plot(*points, "o", color=colour, mec="black", ms=7, label=f"{part}, kept in bf16")
        for line in (axes.axvline, axes.axhline):
            line(1, color="black", lw=0.8, ls="--")
        axes.set_xscale("log")
        axes.set_yscale("log")
        return save(drawn, path)

    def _points(self, part: str, kept: bool) -> tuple[list[float], list[float]]:
        found = [
            (score.activation, score.error)
            for layer in self._layers
            if (score := self._scores.get(layer.name)) is not None
            and layer.kind.startswith(part)
            and (layer.name in self._kept) == kept
            and score.activation is not None
        ]
        return [x for x, _ in found], [y for _, y in found]


def _table(*headings: str) -> Table:
    table = Table(show_edge=False)
    for n, heading in enumerate(headings):
        table.add_column(heading, justify="right" if n else "left")
    return table
