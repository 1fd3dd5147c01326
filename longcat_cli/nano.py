"""`longcat nano`: where the shipped checkpoint is, for whatever takes a checkpoint."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import typer

from longcat_nano import CHECKPOINT


def command() -> None:
    """Print the directory of LongCat-Nano, the checkpoint that comes with this package.

    `vllm serve $(longcat nano)` serves it.
    """
    typer.echo(CHECKPOINT)
