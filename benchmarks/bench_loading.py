"""Seconds to load a checkpoint of many tensors in SGLang: our model's loader beside that of SGLang's own class.

Both fill the same model from the same files, by turns: what differs is the loop over the tensors. One checkpoint has as
many tensors as LongCat-Flash-Chat, which are tiny, so that it shows what a tensor costs; the other has few and large
ones, so that it shows what copying costs. Files are in the page cache.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks import record
from longcat_core import spellings
from longcat_core.config import LongcatConfig
from longcat_core.weights import checkpoint, names
from tests.cases import DEFAULT

CHECKPOINTS = {
    "as many as Chat's": replace(DEFAULT, num_layers=28, n_routed_experts=512, zero_expert_num=256),
    "few and large": replace(
        DEFAULT, n_routed_experts=64, zero_expert_num=32, hidden_size=2048, expert_ffn_hidden_size=1024
    ),
}


def main(pairs: int = 5) -> None:
    rows = []
    for name, config in CHECKPOINTS.items():
        # SGLang can be set up once in a process.
        with tempfile.TemporaryDirectory() as temporary, ProcessPoolExecutor(1, get_context("spawn")) as alone:
            directory = write(Path(temporary), config)
            rows.append({"checkpoint": name, **alone.submit(measured, directory, pairs).result()})
    Console().print(rows)
    print(record.write("loading", rows, pairs=pairs))


def write(directory: Path, config: LongcatConfig) -> Path:
    (directory / "config.json").write_text(json.dumps(spellings.published(config)))
    tensors = {
        name: torch.randn(shape).to(torch.float32 if ".router." in name else torch.bfloat16)
        for name, shape in names.expected_tensors(config, with_mtp=True).items()
    }
    checkpoint.save(tensors, directory, max_shard_size=2**27)
    return directory


def measured(directory: Path, pairs: int) -> dict[str, Any]:
    model, weights = loaded(directory)
    theirs, ours = loaders(model, weights)
    times = record.paired_times(theirs, ours, pairs, seconds=0)
    base, mine, ratio = record.medians(times)
    return {
        "tensors": sum(1 for _ in weights()),
        "SGLang's own class, s": round(base, 2),
        "ours, s": round(mine, 2),
        "ratio": round(ratio, 2),
    }


def loaded(directory: Path) -> tuple[Any, Callable[[], Iterator[tuple[str, Tensor]]]]:
    """The model in this process, and its tensors as SGLang reads them, as often as they are requested."""
    from longcat_sglang.devices.cpu.platform import prepare_cpu_as_for_longcat

    prepare_cpu_as_for_longcat()
    from sglang.benchmark import one_batch
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs, ServerArgs

    load_plugins()
    server_args = ServerArgs(
        model_path=str(directory), dtype="bfloat16", mem_fraction_static=0.5, max_total_tokens=1024, log_level="error"
    )
    server_args.resolve_once()
    rank = one_batch.spawn_world_rank(server_args, tp_rank=0, pp_rank=0)
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=0))
    with patch.object(one_batch, "get_tokenizer", lambda *_, **__: None):
        runner = one_batch.load_model(server_args, PortArgs.init_new(server_args), 0, 0)[0].torch_runner
    loader = DefaultModelLoader(LoadConfig())
    return runner.model, lambda: loader._get_all_weights(runner.model_config, runner.model)


def loaders(
    model: nn.Module, weights: Callable[[], Iterator[tuple[str, Tensor]]]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """That of SGLang's class, on our model, whose parameters have the same names, and ours."""
    from sglang.srt.models.longcat_flash import LongcatFlashForCausalLM

    class OfSGLang:
        use_ngram_embedding = False

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def post_load_weights(self, weight_names: list[str]) -> None:
            model.post_load_weights()

    model.state_dict()  # which unpacks the experts for good
    return (
        lambda: LongcatFlashForCausalLM.load_weights(OfSGLang(), weights()),
        lambda: model.load_weights(weights()),
    )


if __name__ == "__main__":
    typer.run(main)
