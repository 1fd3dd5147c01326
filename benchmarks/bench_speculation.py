"""What drafting with the MTP layer brings: accepted drafts, and output tokens a second beside the engine without it.

A random LongCat whose MTP layer agrees with it about every second time, greedy, with and without a gate trained on
other prompts, at 1 and 8 requests at once, in eager mode. Plain decoding runs before and after, so that a machine that
changes its speed shows.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.bench_serving import AT_ONCE, CONFIG, NEW_TOKENS, PROMPT_TOKENS
from longcat_cli.train_gate import read_prompts
from longcat_core import drafting
from longcat_core.checkpoint import read_config
from longcat_core.config import LongcatConfig
from longcat_core.reference import LongcatForCausalLM
from tests.cases import drafting_tensors, in_dtype, write_checkpoint
from tests.harness import engine

DRAFT_TOKENS = (1, 3)
TRAINING_PROMPTS, TRAINING_TOKENS = 16, 96


def main(
    checkpoint: Annotated[Path | None, typer.Option(help="Measure this one, with its own prompts.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text, one prompt a line, for that checkpoint.")] = None,
    rounds: int = 3,
) -> None:
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as temporary, console.status("") as status:
        plain, gated = Path(temporary) / "plain", Path(temporary) / "gated"
        if checkpoint is not None and prompts is not None:
            shutil.copytree(checkpoint, plain, ignore=shutil.ignore_patterns(str(drafting.GATE_FILE.parent)))
            config = read_config(plain)
            texts = read_prompts(prompts, plain, config, NEW_TOKENS)
        else:
            status.update("making a checkpoint")
            config = CONFIG
            write_checkpoint(plain, config, in_dtype(drafting_tensors(config, disagreement=0.25), torch.bfloat16))
            shape = (TRAINING_PROMPTS + max(AT_ONCE), PROMPT_TOKENS)
            texts = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).tolist()
        asked, training = texts[: max(AT_ONCE)], texts[max(AT_ONCE) : max(AT_ONCE) + TRAINING_PROMPTS]
        shutil.copytree(plain, gated)
        status.update("training a gate")
        write_gate(gated, config, training)
        rows = []
        runs = [(plain, None), *itertools.product((plain, gated), DRAFT_TOKENS), (plain, None)]
        for directory, draft_tokens in runs:
            name = "none" if draft_tokens is None else str(draft_tokens)
            status.update(f"{engine.NAME}, {name} drafts, {directory.name}")
            found = measured(directory, draft_tokens, asked, rounds)
            rows.append({"drafts": name, "gate": directory is gated, **found})
    for row in rows:
        for n in AT_ONCE:
            base = (rows[0][f"tokens/s at {n}"] + rows[-1][f"tokens/s at {n}"]) / 2
            row[f"ratio at {n}"] = round(row[f"tokens/s at {n}"] / base, 2)
    table = Table(*rows[1])
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in rows[1]))
    Console(width=160).print(table)
    print(record.write("speculation", rows, new_tokens=NEW_TOKENS, model=config.to_hf()))


def write_gate(directory: Path, config: LongcatConfig, prompts: list[list[int]]) -> None:
    """As `longcat train-gate` does it, of tokens rather than text."""
    model, steps = LongcatForCausalLM.from_checkpoint(directory), max(DRAFT_TOKENS)
    chains = [drafting.draft_chains(model, p, model.generate(p, TRAINING_TOKENS), steps) for p in prompts]
    trained, judged = chains[: len(chains) // 2], chains[len(chains) // 2 :]
    gate = drafting.train(trained, seed=0)
    gate.threshold = drafting.choose(drafting.trade_off(gate, judged, [n / 50 for n in range(50)])).threshold
    drafting.save(gate, directory, drafting.fingerprint(directory, config))


def measured(directory: Path, draft_tokens: int | None, prompts: list[list[int]], rounds: int) -> dict[str, Any]:
    """Tokens a verification (the accepted length), and tokens a second."""
    with engine.serving(directory, dtype="bfloat16", draft_tokens=draft_tokens, prefix_caching=False) as served:
        found: dict[str, Any] = {}
        if draft_tokens is not None:
            accepted = [taken for each in served.speculated(prompts, NEW_TOKENS) for taken in each.accepted]
            found["accepted length"] = round(1 + statistics.mean(accepted), 2)
            found["first drafts accepted"] = round(statistics.mean(taken > 0 for taken in accepted), 2)
        for n in AT_ONCE:
            seconds = []
            for _ in range(rounds + 1):  # the first warms up
                started = time.perf_counter()
                served.greedy(prompts[:n], NEW_TOKENS)
                seconds.append(time.perf_counter() - started)
            found[f"tokens/s at {n}"] = round(n * NEW_TOKENS / statistics.median(seconds[1:]), 1)
    return found


if __name__ == "__main__":
    typer.run(main)
