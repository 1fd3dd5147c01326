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
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.bench_serving import AT_ONCE, CONFIG, NEW_TOKENS, PROMPT_TOKENS
from longcat_core import drafting
from longcat_core.reference import LongcatForCausalLM
from tests.cases import drafting_tensors, in_dtype, write_checkpoint
from tests.harness import engine

DRAFT_TOKENS = (1, 3)
TRAINING_PROMPTS = 16


def main(rounds: int = 3) -> None:
    console = Console(stderr=True)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(CONFIG.vocab_size, (TRAINING_PROMPTS + max(AT_ONCE), PROMPT_TOKENS), generator=generator)
    training, asked = prompts[:TRAINING_PROMPTS].tolist(), prompts[TRAINING_PROMPTS:].tolist()
    with tempfile.TemporaryDirectory() as temporary, console.status("") as status:
        status.update("making a checkpoint")
        tensors = in_dtype(drafting_tensors(CONFIG, disagreement=0.25), torch.bfloat16)
        plain = write_checkpoint(Path(temporary) / "plain", CONFIG, tensors)
        gated = Path(shutil.copytree(plain, Path(temporary) / "gated"))
        status.update("training a gate")
        write_gate(gated, training)
        rows = []
        runs = [(plain, None), *itertools.product((plain, gated), DRAFT_TOKENS), (plain, None)]
        for directory, draft_tokens in runs:
            name = "no drafts" if draft_tokens is None else f"k = {draft_tokens}"
            status.update(f"{engine.NAME}, {name}, {directory.name}")
            rows.append(
                {"drafts": name, "gate": directory is gated, **measured(directory, draft_tokens, asked, rounds)}
            )
    for row in rows:
        for n in AT_ONCE:
            base = (rows[0][f"tokens/s at {n}"] + rows[-1][f"tokens/s at {n}"]) / 2
            row[f"ratio at {n}"] = round(row[f"tokens/s at {n}"] / base, 2)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=160).print(table)
    settings = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "model": CONFIG.to_hf()}
    print(record.write("speculation", rows, **settings))


def write_gate(directory: Path, prompts: list[list[int]]) -> None:
    """As `longcat train-gate` does it, of tokens rather than text."""
    model, steps = LongcatForCausalLM.from_checkpoint(directory), max(DRAFT_TOKENS)
    chains = [drafting.draft_chains(model, p, model.generate(p, NEW_TOKENS), steps) for p in prompts]
    trained, judged = chains[: len(chains) // 2], chains[len(chains) // 2 :]
    gate = drafting.train(trained, seed=0)
    gate.threshold = drafting.choose(drafting.trade_off(gate, judged, [n / 50 for n in range(50)])).threshold
    drafting.save(gate, directory, drafting.fingerprint(directory, CONFIG))


def measured(directory: Path, draft_tokens: int | None, prompts: list[list[int]], rounds: int) -> dict[str, Any]:
    """Accepted length (tokens a verification), drafts verified and accepted, and tokens a second."""
    with engine.serving(directory, dtype="bfloat16", draft_tokens=draft_tokens, prefix_caching=False) as served:
        found: dict[str, Any] = {"tokens a step": 1.0}
        if draft_tokens is not None:
            accepted = [taken for each in served.speculated(prompts, NEW_TOKENS) for taken in each.accepted]
            found["tokens a step"] = round(1 + statistics.mean(accepted), 2)
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
