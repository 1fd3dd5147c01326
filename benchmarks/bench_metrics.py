"""What counting expert choices costs a decode step: steps that count and steps that do not, in turn, in one engine.

The model of `bench_serving.py`, in eager mode, where every small operation takes longest. A step is a forward pass of
the model with its counting. Two figures: the time in the call that counts, and the difference between a step and its
neighbour. The second also has what is kept for the call, but neighbours differ by more than that for other reasons, so
that its share of the step is given with those of the passes that it was least and greatest in. All are medians.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import chain, count, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.bench_serving import AT_ONCE, CONFIG, PROMPT_TOKENS
from longcat_cli.make_checkpoint import make_checkpoint
from longcat_core import spellings
from tests.harness import ENGINE, engine

WARM_UP, PAIRS = 30, 100
LAYERS = (CONFIG.num_layers, 28)
"""Those of the small model, and of LongCat-Flash."""


class Pair(NamedTuple):
    """Seconds of a step that does not count, of its neighbour that does, and of these, those in the call."""

    without: float
    counting: float
    call: float


def main(passes: int = 3) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        times = Path(temporary) / "times"
        for layers, n in product(LAYERS, AT_ONCE):
            directory = Path(temporary) / f"{layers}-layers"  # SGLang reads the configuration of a path once
            shutil.rmtree(directory, ignore_errors=True)
            make_checkpoint(directory, replace(CONFIG, num_layers=layers), seed=0, dtype=torch.bfloat16)
            times.write_text("")
            broken, new_tokens = partial(count_every_other_step, times), WARM_UP + 2 * PAIRS + 10
            prompts = [list(range(5 + i, 5 + i + PROMPT_TOKENS)) for i in range(n)]
            options: dict[str, Any] = {"dtype": "bfloat16", "broken": broken, "max_model_len": 1024}
            found: list[list[Pair]] = []
            with engine.serving(directory, **options) as served:
                for _ in range(passes):
                    started = len(times.read_text().splitlines())
                    served.greedy(prompts, new_tokens)
                    found.append(pairs(times.read_text().splitlines()[started:]))
            shares = [cost(pass_)["% more"] for pass_ in found]
            rows.append(
                {
                    "layers": layers,
                    "requests at once": n,
                    **cost([*chain(*found)]),
                    "least": min(shares),
                    "greatest": max(shares),
                }
            )
    table = Table(*rows[0], title=f"{engine.NAME}: what counting expert choices costs")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=140).print(table)
    settings = {"prompt_tokens": PROMPT_TOKENS, "pairs": PAIRS, "passes": passes}
    print(record.write("metrics", rows, **settings, model=spellings.published(CONFIG)))


def count_every_other_step(times: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the model append to a file, of each forward pass, 1 if it counted, else 0, its seconds, and those of the
    call."""
    cls: Any = import_module(f"{engine.PACKAGE}.model").LongcatFlashForCausalLM
    counted_choices: Any = import_module(f"{engine.PACKAGE}.metrics").CountedChoices
    forward, lines, numbers, kept = cls.forward, times.open("a", buffering=1), count(), {}
    add, calls = counted_choices.add, [0.0]
    for name in ("LONGCAT_METRICS_DIRECTORY", "PROMETHEUS_MULTIPROC_DIR"):  # as a server of either engine sets one
        monkeypatch.setenv(name, str(times.parent))
    monkeypatch.setattr(f"{engine.PACKAGE}.metrics.are_counted_here", lambda *_: True)

    def timed(model: Any, *args: Any, **kwargs: Any) -> Any:
        holder = model if ENGINE == "vllm" else model.model
        counted, counts = kept.setdefault("counted", holder.counted), next(numbers) % 2
        assert counted is not None
        started = time.perf_counter()
        holder.counted = counted if counts else None
        model.model.notes_choices = bool(counts)  # which SGLang's does not read
        output = forward(model, *args, **kwargs)
        lines.write(f"{counts} {time.perf_counter() - started} {calls[-1] if counts else 0}\n")
        return output

    def timed_add(*args: Any, **kwargs: Any) -> None:
        started = time.perf_counter()
        add(*args, **kwargs)
        calls[-1] = time.perf_counter() - started

    monkeypatch.setattr(cls, "forward", timed)
    monkeypatch.setattr(counted_choices, "add", timed_add)


def pairs(lines: list[str]) -> list[Pair]:
    """`PAIRS` of them after `WARM_UP`."""
    steps = [tuple(map(float, line.split())) for line in lines][WARM_UP:]
    if steps[0][0]:
        steps = steps[1:]
    without, counting = (steps[side : side + 2 * PAIRS : 2] for side in (0, 1))
    return [Pair(alone[1], *neighbour[1:]) for alone, neighbour in zip(without, counting, strict=True)]


def cost(found: list[Pair]) -> dict[str, float]:
    step, call = (statistics.median(times) for times in list(zip(*found, strict=True))[::2])
    more = statistics.median(pair.counting - pair.without for pair in found)
    return {
        "ms a step": round(step * 1e3, 3),
        "ms in the call": round(call * 1e3, 3),
        "% in the call": round(100 * call / step, 2),
        "ms more": round(more * 1e3, 3),
        "% more": round(100 * more / step, 2),
    }


if __name__ == "__main__":
    typer.run(main)
