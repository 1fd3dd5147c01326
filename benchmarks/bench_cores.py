"""What vLLM's binding of threads to cores costs on this machine: output tokens a second of its stock server.

The model of `bench_serving.py`, over HTTP. The first setting runs again at the end, so that a machine that changes its
speed shows.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.bench_serving import AT_ONCE, BOUNDS, CONFIG, PROMPT_TOKENS, served_rate
from longcat_cli.make_checkpoint import make_checkpoint
from longcat_core import spellings
from tests.harness import engine
from tests.server import serving

STOCK = "stock"
SETTINGS: dict[str, dict[str, str]] = {
    STOCK: {},
    "VLLM_CPU_NUM_OF_RESERVED_CPU=0": {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"},
    "VLLM_CPU_OMP_THREADS_BIND=nobind": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    "stock again": {},
}


def main(rounds: int = 3) -> None:
    if record.ENGINE != "vllm":
        raise typer.Exit  # SGLang leaves threads to torch
    prompts = torch.randint(4096, (max(AT_ONCE), PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as temporary, Console(stderr=True).status("") as status:
        directory = Path(temporary) / "checkpoint"
        make_checkpoint(directory, CONFIG, seed=0, dtype=torch.bfloat16)
        command = [*engine.stock_command(directory), *BOUNDS[record.ENGINE], "--enforce-eager"]
        for name, variables in SETTINGS.items():
            status.update(name)
            os.environ.update(variables)
            with serving(command, directory.with_name("server.log")) as server:
                rates = {f"{n} at once, tokens/s": round(served_rate(server, prompts[:n], rounds), 1) for n in AT_ONCE}
            for variable in variables:
                del os.environ[variable]
            rows.append({"setting": name, **rates})
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=140).print(table)
    print(record.write("cores", rows, rounds=rounds, cores=os.cpu_count(), model=spellings.published(CONFIG)))


if __name__ == "__main__":
    typer.run(main)
