"""What less compute brings in speed: output tokens a second at targets of the dial, beside the engine without a dial.

LongCat-Nano continues pieces of held-out files of Python's standard library, greedily, in bf16, as the stock command
runs it. One engine runs all targets of a pass, each after requests in which the dial comes to it. A ratio is to the
engine without a dial in the same pass, and the median of the passes is given with the least and the greatest.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import statistics
import time
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from benchmarks import record
from examples.nano.corpus import encode, standard_library
from examples.nano.settings import Settings
from longcat_nano import CHECKPOINT
from tests.harness import engine

TARGETS = (1.0, 2.0, 8 / 3, 3.0, 4.0)
"""FFN experts a token, some of those whose quality `bench_dial.py` measures; Nano was trained at 4."""
AT_ONCE, PROMPT_TOKENS, NEW_TOKENS = (1, 64), 64, 128
"""Requests at once, of so many tokens each."""
SETTLING_ROUNDS = 3
"""Of the most requests at once, between another target and the first figure."""
WITHOUT = "none"


def main(passes: int = 5, rounds: int = 3) -> None:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    held_out = encode(tokenizer, list(standard_library(Settings().held_out).held_out.values()))
    pieces = held_out[: len(held_out) // PROMPT_TOKENS * PROMPT_TOKENS].view(-1, PROMPT_TOKENS)
    prompts: list[list[int]] = pieces[:: len(pieces) // max(AT_ONCE)][: max(AT_ONCE)].tolist()
    found = [one_pass(prompts, rounds) for _ in range(passes)]
    rows: list[dict[str, Any]] = []
    for target in found[0]:
        row: dict[str, Any] = {"target": target}
        for n in AT_ONCE:
            ratios = [speeds[target][n] / speeds[WITHOUT][n] for speeds in found]
            row[f"tokens/s at {n}"] = round(statistics.median(speeds[target][n] for speeds in found), 1)
            row[f"ratio at {n}"] = round(statistics.median(ratios), 3)
            row[f"ratios at {n}"] = f"{min(ratios):.3f} to {max(ratios):.3f}"
        rows.append(row)
    table = Table(*rows[0], title=f"{engine.NAME}: LongCat-Nano with a dial")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=140).print(table)
    settings = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "passes": passes, "rounds": rounds}
    print(record.write("dial_speed", rows, **settings))


def one_pass(prompts: list[list[int]], rounds: int) -> dict[str, dict[int, float]]:
    """Output tokens a second by target and requests at once."""
    options: dict[str, Any] = {"dtype": "bfloat16", "prefix_caching": False, **engine.AS_THE_STOCK_COMMAND}
    options["cache_tokens"] = max(AT_ONCE) * (PROMPT_TOKENS + NEW_TOKENS)
    with engine.serving(CHECKPOINT, **options) as served:
        found = {WITHOUT: tokens_per_second(served, prompts, rounds)}
    with engine.serving(CHECKPOINT, **options, **engine.held_at(TARGETS[0])) as served:
        for target in TARGETS:
            served.turn_dial(target)
            for _ in range(SETTLING_ROUNDS):
                served.greedy(prompts, NEW_TOKENS)
            found[f"{target:.3g}"] = tokens_per_second(served, prompts, rounds)
    return found


def tokens_per_second(served: engine.Engine, prompts: list[list[int]], rounds: int) -> dict[int, float]:
    """The best of so many rounds, after one that is not timed."""
    speeds: dict[int, float] = {}
    for n in AT_ONCE:
        served.greedy(prompts[:n], NEW_TOKENS)
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            served.greedy(prompts[:n], NEW_TOKENS)
            seconds.append(time.perf_counter() - started)
        speeds[n] = n * NEW_TOKENS / min(seconds)
    return speeds


if __name__ == "__main__":
    typer.run(main)
