"""Where the time of a decode step goes: attention, MoE, dense FFNs and the rest of the model, and the engine around it.

The model of `bench_serving.py`, in the engine, in eager mode; the forward passes of its modules are timed. They are all
called here; a server's decode steps on one rank go past most of them (docs/cpu.md), and take less time.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import tempfile
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.bench_serving import AT_ONCE, CONFIG, PROMPT_TOKENS
from longcat_cli.make_checkpoint import make_checkpoint
from longcat_core import spellings
from tests.harness import engine

METHODS = ("project", "attend", "begin", "compute", "end", "partial")
"""Of modules that a layer calls in steps; of the others `forward` is timed."""
PARTS = {"LongcatAttention": "attention", "LongcatMoE": "MoE", "LongcatFFN": "dense FFNs", "LongcatModel": "model"}
WARM_UP, STEPS = 30, 100


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        directory, times = Path(temporary) / "checkpoint", Path(temporary) / "times"
        make_checkpoint(directory, CONFIG, seed=0, dtype=torch.bfloat16)
        for n in AT_ONCE:
            times.write_text("")
            with engine.serving(directory, dtype="bfloat16", broken=partial(time_modules, times)) as served:
                served.greedy([list(range(5 + i, 5 + i + PROMPT_TOKENS)) for i in range(n)], WARM_UP + STEPS + 10)
            rows.append({"requests at once": n, **step(times.read_text().splitlines())})
    table = Table(*rows[0], title=f"{engine.NAME}: milliseconds of a decode step")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=140).print(table)
    print(record.write("step", rows, prompt_tokens=PROMPT_TOKENS, steps=STEPS, model=spellings.published(CONFIG)))


def time_modules(times: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each module of `PARTS` append its name, its start and its seconds to a file, a line a step or call."""
    lines = times.open("a", buffering=1)
    monkeypatch.setattr(import_module(f"{engine.PACKAGE}.devices.cpu.decoding"), "_compiled", lambda _: None)
    for file in ("model", "attention", "ffn", "moe"):
        module = import_module(f"{engine.PACKAGE}.{file}")
        for name in PARTS.keys() & vars(module).keys():
            cls = getattr(module, name)
            if cls.__module__ == module.__name__:
                for method in [step for step in METHODS if step in vars(cls)] or ["forward"]:
                    monkeypatch.setattr(cls, method, _timed(getattr(cls, method), name, lines))


def _timed(forward: Any, name: str, lines: Any) -> Any:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        output = forward(*args, **kwargs)
        lines.write(f"{name} {started} {time.perf_counter() - started}\n")
        return output

    return timed


def step(lines: list[str]) -> dict[str, float]:
    """Milliseconds of a step by part, over the `STEPS` after the first `WARM_UP`."""
    calls = [(name, float(started), float(seconds)) for name, started, seconds in map(str.split, lines)]
    starts = [started for name, started, _ in calls if name == "LongcatModel"]
    first, last = starts[WARM_UP], starts[WARM_UP + STEPS]
    spent = dict.fromkeys(PARTS, 0.0)
    for name, started, seconds in calls:
        if first <= started < last:
            spent[name] += seconds * 1e3 / STEPS
    whole, model = (last - first) * 1e3 / STEPS, spent.pop("LongcatModel")
    parts = {PARTS[name]: value for name, value in spent.items()}
    rest = {"rest of the model": model - sum(parts.values()), "engine": whole - model, "whole step": whole}
    return {name: round(value, 2) for name, value in (parts | rest).items()}


if __name__ == "__main__":
    typer.run(main)
