"""What a decode step of short requests costs where the model's context is long: as much as where it is short.

An engine keeps a table of each request's place in the cache, as wide as the longest context there may be. The model is
small, so that work on the table shows; 131,072 tokens is LongCat-Flash's own context.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.bench_step import STEPS, WARM_UP, step, time_modules
from longcat_cli.make_checkpoint import make_checkpoint
from longcat_core import spellings
from tests.cases import CHAT, DEFAULT
from tests.harness import ENGINE, engine

CONTEXTS = (512, CHAT["max_position_embeddings"])
PROMPT_TOKENS, AT_ONCE = 16, 64
BOUNDS = {"vllm": "max_model_len", "sglang": "context_length"}


def main(rounds: int = 3) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, context in enumerate(CONTEXTS * rounds):
            directory, times = Path(temporary) / str(number), Path(temporary) / f"{number}.times"
            config = replace(DEFAULT, max_position_embeddings=context)
            make_checkpoint(directory, config, seed=0, dtype=torch.float32)
            times.write_text("")
            options = {BOUNDS[ENGINE]: context, "max_running": AT_ONCE, "cache_tokens": 1 << 18}
            with engine.serving(directory, broken=partial(time_modules, times), **options) as served:
                served.greedy([[7 + n] * PROMPT_TOKENS for n in range(AT_ONCE)], WARM_UP + STEPS + 10)
            rows.append({"context": context, **step(times.read_text().splitlines())})
    table = Table(*rows[0], title=f"{engine.NAME}: milliseconds of a decode step of {AT_ONCE} requests")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=140).print(table)
    settings = {
        "prompt_tokens": PROMPT_TOKENS,
        "requests": AT_ONCE,
        "steps": STEPS,
        "model": spellings.published(DEFAULT),
    }
    print(record.write("context", rows, **settings))


if __name__ == "__main__":
    typer.run(main)
