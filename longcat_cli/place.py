"""`longcat place`: where the engines are to have each FFN expert, by how often each was chosen."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console


def command(
    counts: Annotated[
        Path, typer.Argument(metavar="COUNTS", help="As longcat inspect --record or SGLang's recorder writes them.")
    ],
    output: Annotated[Path, typer.Argument(metavar="FILE", help="What to write, .json.")],
    ranks: Annotated[int, typer.Option(min=2, help="Ranks that share the experts.")],
    redundant: Annotated[
        int, typer.Option(min=0, help="Places of a layer beyond one for each expert; replicas of the busiest get them.")
    ] = 0,
    ranks_a_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks of a machine, if there are several: replicas are spread over them.")
    ] = None,
) -> None:
    """Place experts on ranks so that the busiest rank of each layer has few rows.

    SGLang reads the file with --init-expert-location, vLLM with --additional-config. A choice of a zero expert is no
    row.
    """
    errors = Console(stderr=True, highlight=False)
    with errors.status("importing torch"):
        from longcat_core.parallel import location
        from longcat_core.parallel.placement import counted_rows, linear, place
    try:
        if output.suffix != ".json":
            raise ValueError(f"{output}: wanted a name that ends in .json, by which engines know it")
        rows = counted_rows(location.counts_of(location.read(str(counts), location.COUNTS)).numpy())
        _, layers, experts = rows.shape
        if (experts + redundant) % ranks:
            raise ValueError(f"--ranks: {ranks}, wanted a divisor of the {experts} experts and {redundant} redundant")
        placed = place(rows, ranks, redundant, ranks_a_node=ranks_a_node)
        output.write_text(json.dumps({location.PLACES: placed.physical_to_logical.tolist()}))
    except (ValueError, OSError) as error:
        errors.print(f"longcat place: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    mean = rows.mean(axis=0)

    def busiest(rank_rows: Any) -> float:
        return float((rank_rows.max(axis=-1) / rank_rows.mean(axis=-1)).mean())

    before, after = (busiest(each.rank_rows(mean)) for each in (linear(layers, experts, ranks), placed))
    typer.echo(
        f"{output}: {experts + redundant} places of {experts} experts on {ranks} ranks. The busiest rank has "
        f"{after:.2f} times the mean, {before:.2f} with experts in their order, mean over {layers} layers."
    )
