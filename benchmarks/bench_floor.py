"""Decode steps and prompts over their floors: what a processor needs at least, by what was measured of it in the run.

Three models in bf16: random ones of 123 M and of 622 M parameters, and the shipped LongCat-Nano, whose weights fit in
a processor's cache, so that it can be below its floor. In-process, the engine eager and, where it does that, compiled:
milliseconds between forward passes by requests and context, and from a prompt to its first token; transformers' decode
steps, and mlx-lm's where it is given; and output tokens a second of the stock server over HTTP, prompts included.
Floors are those of `benchmarks/floors.py`, with the experts that the eager engine's routers chose; those of an engine's
steps with the bandwidth that memory had right after them, the others with that before the run.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.bench_serving import AT_ONCE, BOUNDS, CONFIG, NEW_TOKENS, PROMPT_TOKENS, served_rate
from benchmarks.floors import Floor, Machine, Routed, decode_floor, measured_machine, prefill_floor
from benchmarks.passes import AFTER, MOST_REQUESTS, WARM_UP, Notes, Pass, Steps, decode_steps, prefill_seconds
from longcat_cli.make_checkpoint import make_checkpoint
from longcat_core import spellings
from longcat_core.config import LongcatConfig
from longcat_core.planning.calibration import SIZES
from longcat_core.planning.models import of_config
from longcat_core.weights import checkpoint
from longcat_nano import CHECKPOINT
from tests.harness import engine
from tests.oracle import oracle
from tests.server import serving


class Name(StrEnum):
    nano = "Nano"
    small = "123M"
    large = "622M"


LONGEST = 1 << 16
CONFIGS = {
    Name.nano: replace(
        spellings.read(json.loads((CHECKPOINT / "config.json").read_text())), max_position_embeddings=LONGEST
    ),
    Name.small: replace(CONFIG, max_position_embeddings=LONGEST),
    Name.large: replace(
        CONFIG,
        vocab_size=8192,
        hidden_size=1024,
        num_layers=6,
        num_attention_heads=16,
        q_lora_rank=384,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        ffn_hidden_size=2048,
        expert_ffn_hidden_size=384,
        max_position_embeddings=LONGEST,
    ),
}
"""The large one has 622 M parameters, of which a token with 8 FFN experts activates 217 M. Positions reach further than
Nano was trained for."""
REQUESTS, CONTEXTS, PROMPTS = (1, 2, 4, 8, 16, 32), (128, 2048, 8192, 32768), (512, 4096)
assert CONTEXTS[0] == PROMPT_TOKENS + NEW_TOKENS // 2, "what a request over HTTP has on average"
PREFILLS = 3
RUNS: dict[str, dict[str, Any]] = {"eager": {}}
if engine.AS_THE_STOCK_COMMAND:
    RUNS["compiled"] = engine.AS_THE_STOCK_COMMAND
MEMORY: dict[str, Callable[[LongcatConfig, int], dict[str, Any]]] = {
    "vllm": lambda config, tokens: {"kv_cache_memory_bytes": tokens * config.kv_cache_bytes_per_token()},
    "sglang": lambda config, tokens: {"mem_fraction_static": 0.6},
}
"""What an engine must be told beside the tokens in its cache."""


class Cell(NamedTuple):
    requests: int
    context: int
    """Cached tokens of a request, on average over the steps that are timed."""


ALONE = Cell(1, CONTEXTS[0])


@dataclass(frozen=True)
class Plan:
    cells: tuple[Cell, ...]
    beside: tuple[Cell, ...]
    """Of the cells, those in which transformers is measured, and the server."""
    prompts: tuple[int, ...]
    steps: int

    @property
    def chunk(self) -> int:
        """Tokens of a pass, at most: a whole prompt, where one is timed."""
        return max((1024, *self.prompts))

    def prompt_tokens(self, cell: Cell) -> int:
        return cell.context - WARM_UP - self.steps // 2

    def new_tokens(self, cell: Cell) -> int:
        """The first requests get tokens already while the last prompts are computed."""
        return WARM_UP + self.steps + AFTER + cell.requests * cell.context // self.chunk + 4

    def tokens(self, cell: Cell) -> int:
        """That are cached at the end, with the rest of a block for each request."""
        return cell.requests * (self.prompt_tokens(cell) + self.new_tokens(cell) + 16)


def plan_of(is_quick: bool, steps: int, cached_tokens: int) -> Plan:
    cells = [Cell(n, context) for context in CONTEXTS for n in REQUESTS if n * context <= cached_tokens]
    beside = tuple(cell for cell in cells if cell.context == CONTEXTS[0] and cell.requests in AT_ONCE)
    if is_quick:
        return Plan(beside, (), PROMPTS, steps)
    return Plan(tuple(cells), beside, PROMPTS, steps)


class Times(NamedTuple):
    """Of one engine."""

    decode: dict[Cell, Steps]
    prefill: dict[int, float]
    """Seconds by tokens of the prompt."""
    threads: int


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="622M alone: 1 and 8 requests at a context of 128, and prompts.")
    ] = False,
    models: Annotated[list[Name] | None, typer.Option("--model", help="One or several; else all.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps that are timed, of which the median is taken.")] = 32,
    cached_tokens: Annotated[int, typer.Option(help="Leave out what has more tokens in the cache at once.")] = 1 << 16,
    rounds: Annotated[int, typer.Option(help="Of requests over HTTP.")] = 3,
    mlx_lm: Annotated[
        Path | None,
        typer.Option("--mlx-lm", help="A Python with mlx-lm (`make mlx`), which 622M is then served by too."),
    ] = None,
) -> None:
    """Each model is recorded when it is measured, in place of what was known of it; a quick run by itself."""
    console, plan = Console(stderr=True), plan_of(quick, steps, cached_tokens)
    sizes = replace(SIZES, seconds=1.0) if quick else SIZES
    for name in [Name.large] if quick else models or list(Name):
        load = os.getloadavg()[0]
        console.log(f"the machine, whose load average is {load:.2f}")
        machine = measured_machine(sizes)
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary) / "checkpoint"
            console.log(f"{name}: a checkpoint")
            apart(write_checkpoint, name, directory)
            rows = measured(name, directory, plan, machine, rounds, console)
            if mlx_lm is not None and name == Name.large and ALONE in plan.beside:
                console.log(f"{name}: mlx-lm")
                rows.append(mlx_lm_row(name, directory, plan, rows, mlx_lm))
        show(rows, machine)
        again = measured_machine(sizes)
        drift = {figure: round(again.figures[figure] / value, 2) for figure, value in machine.figures.items()}
        settings = {
            "date": record.environment()["date"],
            "machine": {figure: round(value, 2) for figure, value in machine.figures.items()},
            "machine_after_over_before": drift,
            "load_average_before": round(load, 2),
            "steps": steps,
            "cached_tokens": cached_tokens,
            "chunk": plan.chunk,
            "config": spellings.published(CONFIGS[name]),
        }
        print(write("floor_quick" if quick else "floor", name, rows, settings))


def write(file: str, name: Name, rows: list[dict[str, Any]], settings: dict[str, Any]) -> Path:
    """Beside the rows of other models that are there."""
    path = record.path_of(file)
    before = json.loads(path.read_text()) if path.exists() else {"rows": [], "settings": {}}
    runs = {other: each for other, each in before["settings"].items() if other in list(Name)} | {name.value: settings}
    others = [row for row in before["rows"] if row["model"] in runs and row["model"] != name.value]
    return record.write(file, sorted([*others, *rows], key=lambda row: list(Name).index(row["model"])), **runs)


def write_checkpoint(name: Name, directory: Path) -> None:
    if name != Name.nano:
        make_checkpoint(directory, CONFIGS[name], seed=0, dtype=torch.bfloat16, with_mtp=False)
        return
    shutil.copytree(CHECKPOINT, directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": LONGEST}))


def measured(
    name: Name, directory: Path, plan: Plan, machine: Machine, rounds: int, console: Console
) -> list[dict[str, Any]]:
    """Rows of one model."""
    config = CONFIGS[name]
    model = of_config(spellings.published(config), name)
    console.log(f"{name}: transformers")
    theirs = apart(transformers_times, directory, config, plan) if plan.beside else {}
    engines: dict[str, Times] = {}
    for run in RUNS:
        console.log(f"{name}: {engine.NAME}, {run}")
        engines[run] = apart(engine_times, directory, config, run, plan)
    routed = {cell: found.routed for cell, found in engines["eager"].decode.items() if found.routed is not None}
    floors = {cell: (decode_floor(model, machine.rates, *cell, chosen), chosen) for cell, chosen in routed.items()}
    rows = []
    for run, times in engines.items():
        for cell, (seconds, rate, _) in times.decode.items():
            rates = replace(machine.rates, memory_bytes_per_second=rate or machine.rates.memory_bytes_per_second)
            floor = decode_floor(model, rates, *cell, routed[cell])
            rows.append(row(name, run, cell, seconds, floor, routed[cell], rate, threads=times.threads))
        for tokens, seconds in times.prefill.items():
            floor = prefill_floor(model, machine.rates, tokens)
            rows.append(row(name, run, Cell(1, tokens), seconds, floor, threads=times.threads))
    for cell, seconds in theirs.items():
        rows.append(row(name, "transformers", cell, seconds, *floors[cell]))
    if name == Name.large and plan.beside:
        console.log(f"{name}: {engine.NAME}'s stock server")
        for cell, rate in served_rates(directory, plan.beside, rounds).items():
            rows.append(row(name, "HTTP", cell, cell.requests / rate, *floors[cell]))
    return rows


def row(
    name: Name,
    run: str,
    cell: Cell,
    seconds: float,
    floor: Floor,
    routed: Routed | None = None,
    bytes_per_second: float | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """routed: of a decode step; a pass without it is over a prompt. bytes_per_second: of memory, where it was measured
    right after the steps."""
    tokens = cell.context if routed is None else cell.requests
    return {
        "model": name.value,
        "run": run,
        "pass": "prefill" if routed is None else "decode",
        "requests": cell.requests,
        "context": cell.context,
        "ms": round(seconds * 1e3, 2),
        "tokens/s": round(tokens / seconds, 1),
        "memory, GB/s": None if bytes_per_second is None else round(bytes_per_second / 1e9, 1),
        "floor, ms": round(floor.seconds * 1e3, 2),
        "fraction": round(floor.seconds / seconds, 3),
        "bound by": floor.bound,
        "experts read": None if routed is None else round(routed.experts, 1),
        "threads": threads,
    }


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """In a process of its own, as vLLM binds the threads of the process that it runs in, and what is started there."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def engine_times(directory: Path, config: LongcatConfig, run: str, plan: Plan, streams: bool = False) -> Times:
    """streams: as of `Notes`.

    Raises:
        ValueError: if the engine did not do what was asked of it: too few steps of all requests at once, or none whose
            experts could be counted.
    """
    decode, prefill, threads = {}, {}, 0
    cached = max([*map(plan.tokens, plan.cells), *plan.prompts]) + plan.chunk
    with tempfile.TemporaryDirectory() as folder, Console(stderr=True).status("starting") as status:
        notes = Notes(Path(folder), plan.steps, counts_experts=run == "eager", times_memory=True, streams=streams)
        options = {
            "dtype": "bfloat16",
            "chunk": plan.chunk,
            "prefix_caching": False,
            "cache_tokens": cached,
            "max_model_len": min(cached, LONGEST) - 32,  # a block is nobody's, another may be full in part
            "max_running": MOST_REQUESTS + 1,  # SGLang keeps one back
            "broken": notes.watch,
        }
        with engine.serving(directory, **options, **MEMORY[record.ENGINE](config, cached), **RUNS[run]) as served:
            notes.leave_prompts_out()
            for cell in plan.cells:
                status.update(f"{cell.requests} requests, context {cell.context}")
                notes.taken()
                prompts = random_prompts(config, cell.requests, plan.prompt_tokens(cell))
                served.greedy(prompts, plan.new_tokens(cell))
                passes = notes.taken()
                decode[cell] = decode_steps(passes, cell.requests, plan.steps)
                if notes.counts_experts and decode[cell].routed is None:
                    raise ValueError("no routing was seen, wanted the model to ask its device for `router_functions`")
                threads = passes[-1].threads
            notes.compute_prompts()
            for tokens in plan.prompts:
                status.update(f"a prompt of {tokens}")
                seconds = []
                for prompt in random_prompts(config, PREFILLS, tokens):
                    notes.taken()
                    served.greedy([prompt], 3)
                    seconds.append(prefill_seconds(notes.taken()))
                prefill[tokens] = statistics.median(seconds)
    return Times(decode, prefill, threads)


def transformers_times(directory: Path, config: LongcatConfig, plan: Plan) -> dict[Cell, float]:
    """Seconds of a decode step of `generate`."""
    model = oracle(config, checkpoint.load(directory, config), torch.bfloat16)
    passes: list[Pass] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        passes.append(Pass(time.monotonic(), kwargs["input_ids"].numel(), torch.get_num_threads()))

    model.register_forward_pre_hook(note, with_kwargs=True)
    found = {}
    with Console(stderr=True).status("") as status:
        for cell in plan.beside:
            status.update(f"{cell.requests} requests, context {cell.context}")
            passes.clear()
            ids = torch.tensor(random_prompts(config, cell.requests, plan.prompt_tokens(cell)))
            new = plan.new_tokens(cell)
            model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            found[cell] = decode_steps(passes, cell.requests, plan.steps).seconds
    return found


def mlx_lm_row(name: Name, directory: Path, plan: Plan, rows: list[dict[str, Any]], python: Path) -> dict[str, Any]:
    """Beside the floor of transformers' row. In fp32, in which mlx-lm computes on a CPU; the floor is in bf16."""
    sizes = plan.prompt_tokens(ALONE), WARM_UP, plan.steps
    script = Path(__file__).with_name("mlx_lm_steps.py")
    done = subprocess.run([python, script, directory, *map(str, sizes)], stdout=subprocess.PIPE, text=True, check=True)
    seconds = float(done.stdout)
    (beside,) = (each for each in rows if (each["run"], each["requests"]) == ("transformers", 1))
    return beside | {
        "run": "mlx-lm, fp32",
        "ms": round(seconds * 1e3, 2),
        "tokens/s": round(1 / seconds, 1),
        "fraction": round(beside["floor, ms"] / seconds / 1e3, 3),
    }


def served_rates(directory: Path, cells: Iterable[Cell], rounds: int) -> dict[Cell, float]:
    """Output tokens a second. The context of a request is on average the prompt and half of the answer."""
    command = [*engine.stock_command(directory), *BOUNDS[record.ENGINE]]
    prompts = random_prompts(CONFIG, max(cell.requests for cell in cells), PROMPT_TOKENS)
    with serving(command, directory.with_name("server.log")) as server:
        return {cell: served_rate(server, prompts[: cell.requests], rounds) for cell in cells}


def random_prompts(config: LongcatConfig, count: int, tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, config.vocab_size, (count, tokens), generator=generator).tolist()


def show(rows: list[dict[str, Any]], machine: Machine) -> None:
    console = Console(width=140)
    console.print(", ".join(f"{name} {value:.4g}" for name, value in machine.figures.items()))
    table = Table(*rows[0], title=f"{engine.NAME}: times over their floors")
    for each in rows:
        table.add_row(*("" if value is None else str(value) for value in each.values()))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
