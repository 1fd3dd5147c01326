"""Decode steps of an engine on this CPU beside those that `longcat plan` predicts, calibrated in the same minutes.

The processor is calibrated before and after each model, as memory that others share is quicker at one time than at
another. Before that, the fixed costs that predictions rest on (`longcat_core/planning/data/cpu.json` has the mean of
both engines): decode steps of two models of almost nothing, with 1 and 5 layers, once as they are and once with a
processor's cache that is emptied in each layer, as a larger model empties it.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.bench_floor import ALONE, CONFIGS, LONGEST, Cell, Name, Plan, apart, engine_times, write_checkpoint
from benchmarks.bench_serving import CONFIG
from benchmarks.predicted import FEW, LAYERS, MANY, Case, compared, fixed_us
from longcat_cli.make_checkpoint import make_checkpoint
from longcat_core import spellings
from longcat_core.planning import calibration
from tests.harness import engine

REQUESTS = (1, 8, 64)
EMPTY = replace(
    CONFIG,
    vocab_size=512,
    hidden_size=64,
    num_attention_heads=1,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    ffn_hidden_size=64,
    expert_ffn_hidden_size=32,
    n_routed_experts=16,
    zero_expert_num=8,
    moe_topk=6,
    max_position_embeddings=LONGEST,
)
"""What is left of a step if nothing is read or computed."""
SIZES = replace(calibration.SIZES, seconds=2.0)


def main(
    models: Annotated[list[Name] | None, typer.Option("--model", help="One or several; else all.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps that are timed, of which the median is taken.")] = 32,
    again: Annotated[
        bool, typer.Option("--again", help="Beside the record whose fixed costs predictions rest on.")
    ] = False,
) -> None:
    console = Console(stderr=True)
    operator_us, seconds = calibrated()["operator_overhead_us"], {}
    for layers in LAYERS:
        for streams in (False, True):
            console.log(f"{engine.NAME}: {layers} layers of almost nothing{', the cache emptied in each' * streams}")
            seconds.update(steps_of_nothing(layers, streams, steps))
    fixed = fixed_us(seconds)
    before = calibrated()
    fixed["operator_overhead_us"] = min(operator_us, before["operator_overhead_us"])
    rows, settings = [], {}
    for name in models or list(Name):
        console.log(f"{name}: {engine.NAME}")
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary) / "checkpoint"
            apart(write_checkpoint, name, directory)
            plan = Plan(tuple(Cell(n, ALONE.context) for n in REQUESTS), (), (), steps)
            times = apart(engine_times, directory, CONFIGS[name], "eager", plan)
        after = calibrated()
        settings[name.value] = {"config": spellings.published(CONFIGS[name]), "before": before, "after": after}
        rows += [
            {"model": name.value, **cell._asdict(), "ms": round(found.seconds * 1e3, 2), "threads": times.threads}
            for cell, found in times.decode.items()
        ]
        before = after
    rounded = {name: round(value, 2) for name, value in fixed.items()}
    path = record.write("plan_again" if again else "plan", rows, steps=steps, fixed=rounded, **settings)
    show(path, rounded)


def calibrated() -> dict[str, float]:
    figures = calibration.calibrate(SIZES, load=lambda: (0.0,))["figures"]
    return {name: round(figure["value"], 3) for name, figure in figures.items()}  # type: ignore[attr-defined]


def steps_of_nothing(layers: int, streams: bool, steps: int) -> dict[Case, float]:
    """Seconds of a decode step."""
    config = replace(EMPTY, num_layers=layers)
    plan = Plan(tuple(Cell(n, ALONE.context) for n in (1, FEW, MANY)), (), (), steps)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "checkpoint"
        make_checkpoint(directory, config, seed=0, dtype=torch.bfloat16, with_mtp=False)
        times = apart(engine_times, directory, config, "eager", plan, streams)
    return {Case(layers, streams, cell.requests): found.seconds for cell, found in times.decode.items()}


def show(path: Path, fixed: dict[str, float]) -> None:
    console = Console(width=140)
    console.print(", ".join(f"{name} {value:g}" for name, value in fixed.items()))
    table = Table("model", "requests", "ms", "predicted, calibrated before", "after", "mean off", title=str(path))
    for each in compared(json.loads(path.read_text())):
        times = (f"{seconds * 1e3:.2f}" for seconds in (each.measured, each.before, each.after))
        table.add_row(each.model, str(each.requests), *times, f"{each.error:+.0%}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
