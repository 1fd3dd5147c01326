"""`python -m examples.nano.gate CHECKPOINT`: the gate of a trained Nano, and what it saves on held-out files."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from examples.nano import measure, publish, training_record
from examples.nano.chats import chat, explained
from examples.nano.corpus import encode, standard_library
from examples.nano.settings import Settings
from longcat_cli import train_gate
from longcat_cli.loading import read_tokenizer
from longcat_core.drafting import gate as drafting
from longcat_core.reference import LongcatForCausalLM

_PROMPTS = 160


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint that examples.nano.train has written.")],
    library: Annotated[Path | None, typer.Option(help="Python sources, as for the training.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to continue each prompt by.")] = training_record.NEW_TOKENS,
) -> None:
    """Train the gate with `longcat train-gate` on what the model was trained on, measure it on what it was not, and
    note that in the training record."""
    try:
        _train_and_measure(checkpoint, library, new_tokens)
    except (ValueError, OSError) as error:
        typer.echo(f"examples.nano.gate: {error}", err=True)
        raise typer.Exit(1) from None


def _train_and_measure(checkpoint: Path, library: Path | None, new_tokens: int) -> None:
    file = checkpoint / training_record.FILE
    if not file.exists():
        raise ValueError(f"{file}: no such file; give a directory that examples.nano.train has written")
    settings, made = Settings.read(file), json.loads(file.read_text())
    depth = settings.draft_layer.depth
    corpus = standard_library(settings.held_out, library)
    model = LongcatForCausalLM.from_checkpoint(checkpoint)
    stream = encode(read_tokenizer(checkpoint), list(corpus.held_out.values()))
    chains = measure.greedy_chains(model, stream, depth, new_tokens)
    if not chains:
        raise ValueError(f"{checkpoint}: ends every answer to held-out text within {depth} tokens; raise --new-tokens")

    # The results of an earlier gate are removed with it.
    made["results"].pop("gate", None)
    publish.write_json(file, made)
    with tempfile.TemporaryDirectory() as directory:
        lines = Path(directory) / "prompts.txt"
        lines.write_text("\n".join(prompts(corpus.train)) + "\n", encoding="utf-8")
        train_gate.command(checkpoint, lines, steps=depth, new_tokens=new_tokens)

    gate = drafting.load(checkpoint)
    assert gate is not None, "it was just trained"
    trade_offs = drafting.trade_off(gate, chains, [gate.threshold])
    ungated, gated = trade_offs[0], trade_offs[-1]
    made["results"]["gate"] = {
        "threshold": gate.threshold,
        "depth": depth,
        "accepted_length": gated.accepted_length,
        "accepted_length_without": ungated.accepted_length,
        "verified": gated.verified,
        "verified_without": ungated.verified,
    }
    publish.write_json(file, made)
    typer.echo(
        f"on held-out files, {depth} drafts: {1 - gated.verified / ungated.verified:.1%} pruned, "
        f"{1 - gated.accepted_length / ungated.accepted_length:.1%} of the accepted length given up"
    )


def prompts(texts: dict[str, str]) -> Iterator[str]:
    """Lines that open something, and questions as the chat template has them, by turns, from files all over."""
    openings = [
        line
        for text in texts.values()
        for line in text.split("\n")
        if line.startswith(("def ", "class ", "    def ", "        if ", "        for "))
    ]
    questions = [chat(question, "") for text in texts.values() for question, _ in explained(text)]
    for kind in (openings, questions):
        yield from kind[:: max(1, len(kind) // (_PROMPTS // 2))][: _PROMPTS // 2]


if __name__ == "__main__":
    typer.run(command)
