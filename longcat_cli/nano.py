"""`longcat nano`: where the shipped checkpoints are, for whatever takes a checkpoint."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Annotated

import typer

from longcat_nano import CHECKPOINT, TOOLS_CHECKPOINT


def command(tools: Annotated[bool, typer.Option("--tools", help="The one that calls tools.")] = False) -> None:
    """Print the directory of LongCat-Nano, the checkpoint that comes with this package.

    `vllm serve $(longcat nano)` serves it.
    """
    typer.echo(TOOLS_CHECKPOINT if tools else CHECKPOINT)
