"""`python -m examples.nano.tools.ask QUESTION`: the tool-calling Nano in the reference, on real files."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer

from examples.nano.tools.domain import Files, tools
from examples.nano.tools.measure import Player
from longcat_core.reference import LongcatForCausalLM
from longcat_nano import TOOLS_CHECKPOINT

_LONGEST_FILE = 60


def command(
    question: Annotated[str, typer.Argument(help='Such as: Read the first file in "notes".')],
    root: Annotated[Path, typer.Option(help="Where the tools list and read files.")] = Path(),
    checkpoint: Annotated[Path, typer.Option(help="The shipped one, if not given.")] = TOOLS_CHECKPOINT,
) -> None:
    """Print the whole conversation as the model sees it: the text that `longcat inspect --text` takes."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    player = Player(LongcatForCausalLM.from_checkpoint(checkpoint), tokenizer)
    played = player.play([{"role": "user", "content": question}], tools(), True, files_in(root))
    last = played.turns[-1]
    typer.echo(tokenizer.decode(last.prompt + last.output, skip_special_tokens=False))


def files_in(root: Path) -> Files:
    """The short text files up to two directories deep, as the model was trained on short ones."""
    directories: dict[str, dict[str, str]] = {}
    for path in _files(root):
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        if len(text) <= _LONGEST_FILE:
            directory = path.parent.relative_to(root).as_posix()
            directories.setdefault("" if directory == "." else directory, {})[path.name] = text
    return Files(directories)


def _files(root: Path) -> Iterator[Path]:
    for pattern in ("*", "*/*", "*/*/*"):
        yield from sorted(path for path in root.glob(pattern) if path.is_file() and not path.name.startswith("."))


if __name__ == "__main__":
    typer.run(command)
