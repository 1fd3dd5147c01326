"""vLLM end to end with random weights at Chat's width: its own class against the plugin, a process each."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import Case, Context, MissingError, Row, rows
from benchmarks.gpu.vllm_kernels import require
from longcat_core import spellings
from longcat_core.config import LongcatConfig

ROOT = Path(__file__).parents[3]
MODELS = ("plugin", "in-tree")


def stage(context: Context) -> Iterator[Row]:
    yield from rows((Case({"model": model}, partial(_run, context, model)) for model in MODELS), context)


def _run(context: Context, model: str) -> dict[str, Any]:
    config = context.sizes.served
    if config is None or context.device.type != "cuda":
        raise MissingError("vLLM end to end is measured on a GPU alone")
    require()
    with tempfile.TemporaryDirectory() as directory:
        write_config(config, Path(directory))
        command = [sys.executable, "-m", "benchmarks.gpu.serve", directory, model, json.dumps({"dtype": "bfloat16"})]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}: {run.stderr[-2500:]}")
    figures: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    experts = f"{config.n_routed_experts} + {config.zero_expert_num}"
    return {**figures, "layers": config.num_layers, "experts": experts}


def write_config(config: LongcatConfig, directory: Path) -> None:
    """A `config.json` that both vLLM's class and the plugin read; there are no weights."""
    fields = {**spellings.for_transformers(spellings.published(config)), "torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(fields))
