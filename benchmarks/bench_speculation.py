"""What drafting with the MTP layer brings: accepted drafts, and output tokens a second beside the engine without it.

LongCat-Nano continues the beginnings of held-out files of Python's standard library, greedily, in bf16, with and
without its gate, at 1 and 8 requests at once, in eager mode. All of them run in turn, several times: each ratio is to
plain decoding of the same pass, and the median of the passes is given with the least and the greatest.
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


def main(passes: int = 5, rounds: int = 3) -> None:
    console = Console(stderr=True)
    prompts = beginnings(max(AT_ONCE))
    with tempfile.TemporaryDirectory() as temporary, console.status("") as status:
        ungated = Path(temporary) / "nano"
        shutil.copytree(CHECKPOINT, ungated, ignore=shutil.ignore_patterns(str(drafting.GATE_FILE.parent)))
        runs = [(ungated, None), *itertools.product((ungated, CHECKPOINT), DRAFT_TOKENS)]
        rows: list[dict[str, Any]] = []
        for directory, draft_tokens in runs:
            has_gate = directory is CHECKPOINT
            rows.append({"drafts": draft_tokens or "none", "gate": has_gate})
            if draft_tokens is not None:
                rows[-1]["verified a step"] = verified(draft_tokens, has_gate, prompts)
                rows[-1] |= accepted(directory, draft_tokens, prompts)
        speeds: list[list[dict[int, float]]] = [[] for _ in runs]
        for done, (row, (directory, draft_tokens)) in itertools.product(range(passes), enumerate(runs)):
            what = f"{rows[row]['drafts']} drafts, {'a' if rows[row]['gate'] else 'no'} gate"
            status.update(f"{engine.NAME}, pass {done + 1} of {passes}: {what}")
            speeds[row].append(tokens_per_second(directory, draft_tokens, prompts, rounds))
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


def accepted(directory: Path, draft_tokens: int, prompts: list[list[int]]) -> dict[str, float]:
    """The share of first drafts, and tokens a verification (the accepted length)."""
    with engine.serving(directory, dtype="bfloat16", draft_tokens=draft_tokens, prefix_caching=False) as served:
        taken = [each for answer in served.speculated(prompts, NEW_TOKENS) for each in answer.accepted]
    first, length = statistics.mean(each > 0 for each in taken), 1 + statistics.mean(taken)
    return {"first drafts accepted": round(first, 2), "accepted length": round(length, 2)}


def tokens_per_second(
    directory: Path, draft_tokens: int | None, prompts: list[list[int]], rounds: int
) -> dict[int, float]:
    """By the number of requests at once."""
    found = {}
    with engine.serving(directory, dtype="bfloat16", draft_tokens=draft_tokens, prefix_caching=False) as served:
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
