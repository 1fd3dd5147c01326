"""What drafting with the MTP layer brings: accepted drafts, and output tokens a second beside the engine without it.

LongCat-Nano continues the beginnings of held-out files of Python's standard library, greedily, in bf16, with and
without its gate, at 1 and 8 requests at once, in eager mode. Plain decoding runs before and after, so that a machine
that changes its speed shows.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from benchmarks import record
from benchmarks.bench_serving import AT_ONCE, NEW_TOKENS
from examples.nano.corpus import standard_library
from examples.nano.settings import Settings
from longcat_core import drafting
from longcat_core.reference import LongcatForCausalLM
from longcat_nano import CHECKPOINT
from tests.harness import engine

DRAFT_TOKENS = (1, 3)
PROMPT_TOKENS = 64


def main(rounds: int = 3) -> None:
    console = Console(stderr=True)
    prompts = beginnings(max(AT_ONCE))
    with tempfile.TemporaryDirectory() as temporary, console.status("") as status:
        ungated = Path(temporary) / "nano"
        shutil.copytree(CHECKPOINT, ungated, ignore=shutil.ignore_patterns(str(drafting.GATE_FILE.parent)))
        rows = []
        runs = [(ungated, None), *itertools.product((ungated, CHECKPOINT), DRAFT_TOKENS), (ungated, None)]
        for directory, draft_tokens in runs:
            has_gate = directory is CHECKPOINT
            name = "none" if draft_tokens is None else str(draft_tokens)
            status.update(f"{engine.NAME}, {name} drafts, {'a' if has_gate else 'no'} gate")
            found = measured(directory, draft_tokens, prompts, rounds)
            if draft_tokens is not None:
                found["verified a step"] = verified(draft_tokens, has_gate, prompts)
            rows.append({"drafts": name, "gate": has_gate, **found})
    for row in rows:
        for n in AT_ONCE:
            base = (rows[0][f"tokens/s at {n}"] + rows[-1][f"tokens/s at {n}"]) / 2
            row[f"ratio at {n}"] = round(row[f"tokens/s at {n}"] / base, 2)
    table = Table(*rows[1])
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in rows[1]))
    Console(width=160).print(table)
    print(record.write("speculation", rows, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS))


def beginnings(count: int) -> list[list[int]]:
    """Of held-out files that are long enough."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    texts = standard_library(Settings().held_out).held_out.values()
    tokens = (tokenizer.encode(text).ids for text in texts)
    return list(itertools.islice((ids[:PROMPT_TOKENS] for ids in tokens if len(ids) > PROMPT_TOKENS), count))


def measured(directory: Path, draft_tokens: int | None, prompts: list[list[int]], rounds: int) -> dict[str, Any]:
    """Tokens a verification (the accepted length), and tokens a second."""
    with engine.serving(directory, dtype="bfloat16", draft_tokens=draft_tokens, prefix_caching=False) as served:
        found: dict[str, Any] = {}
        if draft_tokens is not None:
            accepted = [taken for each in served.speculated(prompts, NEW_TOKENS) for taken in each.accepted]
            found["first drafts accepted"] = round(statistics.mean(taken > 0 for taken in accepted), 2)
            found["accepted length"] = round(1 + statistics.mean(accepted), 2)
        for n in AT_ONCE:
            seconds = []
            for _ in range(rounds + 1):  # the first warms up
                started = time.perf_counter()
                served.greedy(prompts[:n], NEW_TOKENS)
                seconds.append(time.perf_counter() - started)
            found[f"tokens/s at {n}"] = round(n * NEW_TOKENS / statistics.median(seconds[1:]), 1)
    return found


def verified(draft_tokens: int, has_gate: bool, prompts: list[list[int]]) -> float:
    """Drafts verified a step, by the reference, as SGLang does not count them; a batch of SGLang's verifies as far as
    its longest chain that passes."""
    model, gate = LongcatForCausalLM.from_checkpoint(CHECKPOINT), drafting.load(CHECKPOINT)
    steps: list[drafting.Step] = []
    for prompt in prompts:
        chains = drafting.draft_chains(model, prompt, model.generate(prompt, NEW_TOKENS + draft_tokens), draft_tokens)
        steps += drafting.walk(chains.accepted, gate.kept(chains.features) if gate and has_gate else draft_tokens)
    return round(statistics.mean(step.verified for step in steps), 2)


if __name__ == "__main__":
    typer.run(main)
