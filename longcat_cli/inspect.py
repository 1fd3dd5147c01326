"""`longcat inspect`: what a model's router and drafter do with a text, coloured over its tokens."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.color import Color
from rich.console import Console, Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from longcat_cli import loading
from longcat_cli.loading import LoadingError
from longcat_cli.terminal import printable
from longcat_core.config import ConfigError

if TYPE_CHECKING:
    from longcat_cli.inspection_report import Colours, Report, Shade


def command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Directory of a checkpoint.")],
    text: Annotated[Path, typer.Option(help="The text, a UTF-8 file, as the model is to see it.")],
    html: Annotated[Path | None, typer.Option(help="Write a page with every layer to this file.")] = None,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write to this file, as JSON, how often each FFN expert was chosen."),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(min=0, help="Colour by this layer, the first is 0; by the mean, if not given.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to read at most, from the beginning.")] = 2048,
    ffn_experts: Annotated[
        float | None,
        typer.Option(help="Hold the mean of FFN experts a token here, and colour by what that takes from each."),
    ] = None,
) -> None:
    """Show how many FFN experts each token of a text takes, and which drafts would be accepted.

    The model runs in plain PyTorch. A zero expert costs nothing, so the tokens with many FFN experts are those that the
    model spends its parameters on. With --ffn-experts it reads the text a second time, as a server does whose dial has
    settled on that mean: with a bias of the zero experts in the choice of experts, one a layer.
    """
    errors = Console(stderr=True, highlight=False)
    with errors.status("importing torch"):
        from longcat_core.weights.audit import CheckpointError
    try:
        report = _report(checkpoint, text, tokens, layer, ffn_experts, errors)
        if html is not None:
            html.write_bytes(report.page().encode())
        if record is not None:
            record.write_text(json.dumps({"logical_count": report.inspection.load.tolist()}))
    except (ConfigError, CheckpointError, LoadingError, OSError) as error:
        errors.print(f"longcat inspect: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    console = Console(highlight=False)
    console.print(Group(_coloured(report, layer), Text(), _legend(report, layer), Text(), _summary(report)))
    if html is not None:
        typer.echo(f"{html}: all layers, expert load, and the drafts")
    if record is not None:
        typer.echo(f"{record}: rows of each layer's FFN experts, for longcat place and longcat plan --routing")


def _report(
    directory: Path, file: Path, tokens: int, layer: int | None, ffn_experts: float | None, console: Console
) -> Report:
    from longcat_cli.inspection_report import Held, Report, pieces
    from longcat_core.dial import obstacles_to_dial
    from longcat_core.inspection import held, inspect
    from longcat_core.reference import LongcatForCausalLM
    from longcat_core.weights import checkpoint

    config = checkpoint.read_config(directory)
    if layer is not None and layer >= config.num_layers:
        raise LoadingError(f"--layer: {layer}, wanted 0 to {config.num_layers - 1}; the model has {config.num_layers}")
    if ffn_experts is not None and (obstacles := obstacles_to_dial(config, ffn_experts)):
        raise LoadingError(f"--ffn-experts: {obstacles[0]}")
    encoding = loading.read_tokenizer(directory).encode(content := loading.read_text(file))
    if not encoding.ids:
        raise LoadingError(f"{file}: no tokens, wanted a text")
    loading.require_in_vocabulary(encoding.ids, directory, config, str(file))
    count = min(tokens, len(encoding.ids), config.max_position_embeddings)
    loading.require_memory(directory, config)
    with console.status("loading the checkpoint"):
        model = LongcatForCausalLM.from_checkpoint(directory)
    with console.status(f"reading {count:,} tokens"):
        found, at_target = inspect(model, encoding.ids[:count]), None
        if ffn_experts is not None:
            try:
                with held(model, ffn_experts) as biases:
                    at_target = Held(ffn_experts, inspect(model, encoding.ids[:count]), biases)
            except ValueError as error:
                raise LoadingError(f"--ffn-experts: {error}; give a longer text") from None
    return Report(
        checkpoint=_name(directory.resolve()),
        text=_name(file),
        config=config,
        inspection=found,
        pieces=pieces(content, encoding.offsets[:count]),
        total_tokens=len(encoding.ids),
        held=at_target,
    )


def _coloured(report: Report, layer: int | None) -> Text:
    """The text itself."""
    coloured = Text()
    for piece, shade in zip(report.shown_pieces(), _colours(report).shades(layer), strict=True):
        coloured.append(printable(piece), _style(shade))
    return coloured


def _colours(report: Report) -> Colours:
    return report.taken_away or report.taken


def _name(path: Path) -> str:
    """The name of a file, with bytes that are not UTF-8 replaced."""
    return os.fsencode(path.name).decode(errors="replace")


def _style(shade: Shade) -> Style:
    return Style(color=Color.parse(shade.text), bgcolor=Color.parse(shade.background))


def _legend(report: Report, layer: int | None) -> Text:
    where = "mean of the layers" if layer is None else f"layer {layer}"
    what = "FFN experts a token" if report.held is None else f"FFN experts that {report.held.target:g} take away"
    legend = Text(f"{what}, {where}: ", style="dim")
    for value, shade in _colours(report).scale(layer):
        legend.append(f" {value} ", _style(shade))
    return legend


def _summary(report: Report) -> Table:
    table = Table(show_header=False, show_edge=False, box=None, padding=(0, 2, 0, 0))
    for name, value in report.facts():
        table.add_row(Text(name, style="bold"), value)
    return table
