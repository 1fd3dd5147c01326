"""What FP8 costs and saves in an engine: memory, seconds to load, and output tokens a second over HTTP.

One random model in three checkpoints: in FP8, the same weights dequantised to bf16, and half of its experts in bf16,
which has about as many bytes as the first. Stock servers on this machine, one after the other, twice. Memory is what
the server's processes have for themselves (anonymous and shared memory, not the files' pages), less what a server of a
tiny model has; seconds to load are the engine's own, from its log.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from benchmarks import record
from benchmarks.bench_serving import BOUNDS, served_rate
from longcat_cli import random_weights
from longcat_cli.make_checkpoint import make_checkpoint
from longcat_core.config import LongcatConfig, RopeConfig
from longcat_core.quantization import Quantization
from tests.cases import write_checkpoint
from tests.fp8 import dequantised, released
from tests.harness import engine
from tests.server import Server, processes_of, serving

CONFIG = LongcatConfig(
    vocab_size=4096,
    hidden_size=1024,
    num_layers=4,
    num_attention_heads=8,
    q_lora_rank=256,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    ffn_hidden_size=2048,
    expert_ffn_hidden_size=1024,
    n_routed_experts=72,
    zero_expert_num=36,
    moe_topk=12,
    max_position_embeddings=4096,
    rope=RopeConfig(theta=1e7),
    routed_scaling_factor=6.0,
)
TINY = replace(CONFIG, num_layers=1, n_routed_experts=12, zero_expert_num=4, expert_ffn_hidden_size=32)
LARGE_EXPERTS = replace(CONFIG, hidden_size=2048, expert_ffn_hidden_size=2048, n_routed_experts=18, zero_expert_num=9)
LOADED = {"vllm": r"Loading weights took ([\d.]+) seconds", "sglang": r"Load weight end\. elapsed=([\d.]+) s"}
"""What the log says."""


def main(turns: int = 2, rates: bool = True, large_experts: bool = False) -> None:
    """large_experts: a fourth as many, of 4 MB in FP8 for 1 MB; those of LongCat-Flash have 12.6 MB."""
    console, config = Console(stderr=True), LARGE_EXPERTS if large_experts else CONFIG
    with tempfile.TemporaryDirectory() as temporary, console.status("") as status:
        status.update("making checkpoints")
        checkpoints = write(Path(temporary), config)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in checkpoints}
        for turn in range(turns):
            for name, directory in checkpoints.items():
                status.update(f"turn {turn + 1}: {name}")
                found[name].append(measured(directory, rates and name in ("FP8", "bf16"), Path(temporary) / "log"))
        sizes = {name: size(directory) for name, directory in checkpoints.items()}
    nothing = statistics.median(each["memory, GB"] for each in found.pop("tiny"))
    rows = [{"checkpoint": name, "file, GB": sizes[name], **median(found[name], nothing)} for name in found]
    Console(width=140).print(rows)
    name = "fp8_large_experts" if large_experts else "fp8"
    print(record.write(name, rows, turns=turns, has_fp8_kernels=has_fp8_kernels()))


def write(directory: Path, config: LongcatConfig) -> dict[str, Path]:
    fp8 = replace(config, quantization=Quantization("fp8"))
    release = released(fp8, random_weights.draw(config, seed=0, dtype=torch.float32, with_mtp=False))
    half = replace(config, n_routed_experts=config.n_routed_experts // 2)
    write_checkpoint(directory / "fp8", fp8, release)
    write_checkpoint(directory / "bf16", config, dequantised(release, torch.bfloat16))
    del release
    for name, other in (("half", half), ("tiny", TINY)):
        make_checkpoint(directory / name, other, seed=0, dtype=torch.bfloat16, with_mtp=False)
    for name in ("fp8", "bf16"):  # which have no tokenizer
        for file in (directory / "tiny").glob("*token*"):
            (directory / name / file.name).write_bytes(file.read_bytes())
    return {
        "tiny": directory / "tiny",
        "FP8": directory / "fp8",
        "bf16": directory / "bf16",
        "bf16, half of the experts": directory / "half",
    }


def size(directory: Path) -> float:
    return round(sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e9, 2)


def measured(directory: Path, with_rates: bool, log: Path) -> dict[str, Any]:
    command = [*engine.stock_command(directory), *BOUNDS[record.ENGINE], "--dtype", "bfloat16"]
    with serving(command, log) as server:
        loaded = re.search(LOADED[record.ENGINE], log.read_text(errors="replace"))
        assert loaded is not None, "the engine's log says something else now"
        found = {"memory, GB": memory(server), "seconds to load": float(loaded[1])}
        if with_rates:
            prompts = torch.randint(CONFIG.vocab_size, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
            for n in (1, 8):
                found[f"tokens/s, {n} at once"] = served_rate(server, prompts[:n], 1)
    return found


def memory(server: Server) -> float:
    """GB, of all processes of the server."""
    kinds = ("Pss_Anon", "Pss_Shmem")
    lines = (
        line.split()
        for process in processes_of(server.process)
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    )
    return sum(int(words[1]) for words in lines if words[0].rstrip(":") in kinds) * 1024 / 1e9


def median(turns: list[dict[str, Any]], nothing: float) -> dict[str, Any]:
    found = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    found["memory, GB"] -= nothing
    return {key: round(value, 2) for key, value in found.items()}


def has_fp8_kernels() -> bool:
    """Whether weights stay in FP8 in this engine on this machine."""
    from longcat_core.kernels.cpu.product import takes_fp8

    if record.ENGINE == "sglang":
        return takes_fp8(torch.bfloat16)
    import vllm._custom_ops  # noqa: F401  # which loads them

    return takes_fp8(torch.bfloat16) or hasattr(torch.ops._C, "fp8_scaled_mm_cpu")


if __name__ == "__main__":
    typer.run(main)
