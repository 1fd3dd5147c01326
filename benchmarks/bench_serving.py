"""Output tokens a second: an engine's stock server with the plugin, over HTTP, beside transformers' `generate`.

The same random checkpoint in bf16, the same prompts, greedy, at 1 and 8 requests at once. transformers runs before and
after the server, so that a machine that changes its speed shows.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import concurrent.futures
import statistics
import tempfile
import time
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import record
from longcat_cli.make_checkpoint import make_checkpoint
from longcat_core import spellings
from longcat_core.config import LongcatConfig, RopeConfig
from longcat_core.weights import checkpoint
from tests.harness import engine
from tests.oracle import oracle
from tests.server import Server, serving

CONFIG = LongcatConfig(
    vocab_size=4096,
    hidden_size=512,
    num_layers=4,
    num_attention_heads=8,
    q_lora_rank=192,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    ffn_hidden_size=1024,
    expert_ffn_hidden_size=256,
    n_routed_experts=64,
    zero_expert_num=32,
    moe_topk=12,
    max_position_embeddings=4096,
    rope=RopeConfig(theta=1e7),
    routed_scaling_factor=6.0,
)
PROMPT_TOKENS, NEW_TOKENS = 64, 128
BOUNDS = {
    "vllm": ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(256 << 20)],
    "sglang": ["--context-length", "1024", "--max-total-tokens", "65536", "--mem-fraction-static", "0.5"],
}
"""On the memory that the servers would take."""
AT_ONCE = (1, 8)


def main(rounds: int = 3) -> None:
    console = Console(stderr=True)
    prompts = torch.randint(4096, (max(AT_ONCE), PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    with tempfile.TemporaryDirectory() as temporary, console.status("") as status:
        directory = Path(temporary) / "checkpoint"
        status.update("making a checkpoint")
        make_checkpoint(directory, CONFIG, seed=0, dtype=torch.bfloat16)
        status.update("transformers")
        before = transformers_rates(directory, prompts, rounds)
        status.update(f"starting {engine.NAME}")
        command = [*engine.stock_command(directory), *BOUNDS[record.ENGINE]]
        with serving(command, directory.with_name("server.log")) as server:
            status.update(engine.NAME)
            ours = {n: served_rate(server, prompts[:n], rounds) for n in AT_ONCE}
        status.update("transformers again")
        after = transformers_rates(directory, prompts, rounds)
    rows = [
        {
            "requests at once": n,
            f"{engine.NAME}, tokens/s": round(ours[n], 1),
            "transformers, tokens/s": round((before[n] + after[n]) / 2, 1),
            "ratio": round(2 * ours[n] / (before[n] + after[n]), 2),
            "transformers after / before": round(after[n] / before[n], 2),
        }
        for n in AT_ONCE
    ]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=140).print(table)
    print(
        record.write(
            "serving", rows, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, model=spellings.published(CONFIG)
        )
    )


def transformers_rates(directory: Path, prompts: list[list[int]], rounds: int) -> dict[int, float]:
    """Output tokens a second of `generate`, the requests of a batch in one call."""
    model = oracle(CONFIG, checkpoint.load(directory, CONFIG), torch.bfloat16)
    rates = {}
    for n in AT_ONCE:
        ids = torch.tensor(prompts[:n])
        seconds = []
        for _ in range(rounds + 1):  # the first warms up
            started = time.perf_counter()
            output = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
            seconds.append(time.perf_counter() - started)
            assert output.shape[1] == PROMPT_TOKENS + NEW_TOKENS
        rates[n] = n * NEW_TOKENS / statistics.median(seconds[1:])
    return rates


def served_rate(server: Server, prompts: list[list[int]], rounds: int) -> float:
    """Output tokens a second over HTTP, each request on a connection of its own."""
    model = server.http.get("/v1/models").json()["data"][0]["id"]

    def complete(prompt: list[int]) -> int:
        request = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        answer = server.http.post("/v1/completions", json=request).raise_for_status().json()
        return answer["usage"]["completion_tokens"]

    seconds = []
    for round_ in range(rounds + 1):
        # Another first token each round: a hit in the prefix cache would spare the prefill.
        fresh = [[round_, *prompt[1:]] for prompt in prompts]
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            started = time.perf_counter()
            assert sum(pool.map(complete, fresh)) == len(prompts) * NEW_TOKENS
            seconds.append(time.perf_counter() - started)
    return len(prompts) * NEW_TOKENS / statistics.median(seconds[1:])


if __name__ == "__main__":
    typer.run(main)
