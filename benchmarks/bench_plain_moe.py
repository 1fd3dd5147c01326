"""Output tokens a second of LongCat beside a plain MoE model of the same shape, in one engine.

A LongCat layer has two attentions, two dense FFNs and a MoE, of whose 12 choices about 8 are FFN experts. The plain
model is a Qwen3-MoE of twice as many layers, by turns with a dense FFN and with a MoE of top 8, of the same sizes: one
dense FFN in four blocks less, and no low ranks in its attention. Over token ids, so without HTTP; the models by turns.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.bench_serving import AT_ONCE, CONFIG, NEW_TOKENS, PROMPT_TOKENS
from longcat_cli.make_checkpoint import make_checkpoint
from longcat_core import spellings
from tests.harness import engine


def main(rounds: int = 3) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    console = Console(stderr=True)
    rates: dict[str, dict[int, list[float]]] = {name: {n: [] for n in AT_ONCE} for name in ("longcat", "plain")}
    with tempfile.TemporaryDirectory() as temporary, console.status("making checkpoints") as status:
        make_checkpoint(Path(temporary) / "longcat", CONFIG, seed=0, dtype=torch.bfloat16)
        plain = Qwen3MoeConfig(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.hidden_size,
            intermediate_size=CONFIG.ffn_hidden_size,
            moe_intermediate_size=CONFIG.expert_ffn_hidden_size,
            num_hidden_layers=2 * CONFIG.num_layers,
            decoder_sparse_step=2,
            num_experts=CONFIG.n_routed_experts,
            num_experts_per_tok=8,
            num_attention_heads=CONFIG.num_attention_heads,
            num_key_value_heads=CONFIG.num_attention_heads,
            head_dim=CONFIG.v_head_dim,
            max_position_embeddings=CONFIG.max_position_embeddings,
        )
        Qwen3MoeForCausalLM(plain).to(torch.bfloat16).save_pretrained(Path(temporary) / "plain")
        for round_ in range(2):  # each model twice, so that a machine that changes its speed shows
            for name in rates:
                status.update(f"{name}, {round_ + 1} of 2")
                with engine.serving(Path(temporary) / name, dtype="bfloat16") as served:
                    for n in AT_ONCE:
                        rates[name][n] += measured(served, n, rounds)
    rows = [
        {
            "requests at once": n,
            "LongCat, tokens/s": round(statistics.median(rates["longcat"][n]), 1),
            "Qwen3-MoE, tokens/s": round(statistics.median(rates["plain"][n]), 1),
            "ratio": round(statistics.median(rates["longcat"][n]) / statistics.median(rates["plain"][n]), 2),
        }
        for n in AT_ONCE
    ]
    table = Table(*rows[0], title=engine.NAME)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=140).print(table)
    print(
        record.write(
            "plain_moe", rows, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, model=spellings.published(CONFIG)
        )
    )


def measured(served: engine.Engine, n: int, rounds: int) -> list[float]:
    rates = []
    for round_ in range(rounds + 1):
        prompts = [[7 + round_, *range(6 + i, 5 + i + PROMPT_TOKENS)] for i in range(n)]
        started = time.perf_counter()
        served.greedy(prompts, NEW_TOKENS)
        rates.append(n * NEW_TOKENS / (time.perf_counter() - started))
    return rates[1:]  # the first warms up


if __name__ == "__main__":
    typer.run(main)
