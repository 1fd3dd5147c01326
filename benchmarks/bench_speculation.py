"""What drafting with the MTP layer brings: accepted drafts, and output tokens a second beside the engine without it.

LongCat-Nano continues the beginnings of held-out files of Python's standard library, greedily, in bf16, with and
without its gate, at 1 and 8 requests at once, in eager mode. All of them run in turn, several times: each ratio is to
plain decoding of the same pass, and the median of the passes is given with the least and the greatest.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import statistics
import time
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from benchmarks import record
from benchmarks.bench_serving import AT_ONCE, NEW_TOKENS
from examples.nano.corpus import standard_library
from examples.nano.settings import Settings
from longcat_core.drafting import gate as drafting
from longcat_core.reference import LongcatForCausalLM
from longcat_nano import CHECKPOINT
from tests.harness import engine

DRAFT_TOKENS = (1, 3)
PROMPT_TOKENS = 64


class Run(NamedTuple):
    draft_tokens: int | None
    has_gate: bool

    def serving(self) -> AbstractContextManager[engine.Engine]:
        gate = engine.GATED if self.has_gate else {}
        options = {"dtype": "bfloat16", "draft_tokens": self.draft_tokens, "prefix_caching": False}
        return engine.serving(CHECKPOINT, **options, **gate)


def main(passes: int = 5, rounds: int = 3) -> None:
    console = Console(stderr=True)
    prompts = beginnings(max(AT_ONCE))
    runs: list[Run] = [Run(None, False), *itertools.starmap(Run, itertools.product(DRAFT_TOKENS, (False, True)))]
    rows: list[dict[str, Any]] = []
    with console.status("") as status:
        for run in runs:
            rows.append({"drafts": run.draft_tokens or "none", "gate": run.has_gate})
            if run.draft_tokens is not None:
                rows[-1]["verified a step"] = verified(run.draft_tokens, run.has_gate, prompts)
                rows[-1] |= accepted(run, prompts)
        speeds: list[list[dict[int, float]]] = [[] for _ in runs]
        for done, (row, run) in itertools.product(range(passes), enumerate(runs)):
            what = f"{rows[row]['drafts']} drafts, {'a' if run.has_gate else 'no'} gate"
            status.update(f"{engine.NAME}, pass {done + 1} of {passes}: {what}")
            speeds[row].append(tokens_per_second(run, prompts, rounds))
    for row, found in zip(rows, speeds, strict=True):
        for n in AT_ONCE:
            ratios = [each[n] / plain[n] for each, plain in zip(found, speeds[0], strict=True)]
            row[f"tokens/s at {n}"] = round(statistics.median(each[n] for each in found), 1)
            row[f"ratio at {n}"] = round(statistics.median(ratios), 2)
            row[f"ratios at {n}"] = f"{min(ratios):.2f} to {max(ratios):.2f}"
    table = Table(*rows[1])
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in rows[1]))
    Console(width=160).print(table)
    print(record.write("speculation", rows, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, passes=passes))


def beginnings(count: int) -> list[list[int]]:
    """Of held-out files that are long enough."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    texts = standard_library(Settings().held_out).held_out.values()
    tokens = (tokenizer.encode(text).ids for text in texts)
    return list(itertools.islice((ids[:PROMPT_TOKENS] for ids in tokens if len(ids) > PROMPT_TOKENS), count))


def accepted(run: Run, prompts: list[list[int]]) -> dict[str, float]:
    """The share of first drafts, and tokens a verification (the accepted length)."""
    with run.serving() as served:
        taken = [each for answer in served.speculated(prompts, NEW_TOKENS) for each in answer.accepted]
    first, length = statistics.mean(each > 0 for each in taken), 1 + statistics.mean(taken)
    return {"first drafts accepted": round(first, 2), "accepted length": round(length, 2)}


def tokens_per_second(run: Run, prompts: list[list[int]], rounds: int) -> dict[int, float]:
    """By the number of requests at once."""
    found = {}
    with run.serving() as served:
        for n in AT_ONCE:
            seconds = []
            for _ in range(rounds + 1):  # the first warms up
                started = time.perf_counter()
                served.greedy(prompts[:n], NEW_TOKENS)
                seconds.append(time.perf_counter() - started)
            found[n] = n * NEW_TOKENS / statistics.median(seconds[1:])
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
