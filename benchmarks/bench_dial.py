"""What a dial on LongCat-Nano does: how it comes to a target and stays there, and what less compute costs in quality.

Both in the reference, on files that Nano was not trained on. Counted and computed, not timed.

- Response: sequences that advance by a token a step, as in a server that decodes for so many requests, with the text's
  own tokens. The target falls, and then the traffic changes, from Python to prose and back.
- Frontier: bits a byte, with each layer's bias where a dial settles on text that Nano was trained on.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks import record
from examples.nano import measure
from examples.nano.corpus import encode, standard_library
from longcat_cli.plotting import BLUE, GREY, RED, figure, save
from longcat_core.dial import Dial, settled_bias
from longcat_core.inspection import routers
from longcat_core.reference import LongcatForCausalLM
from longcat_nano import CHECKPOINT
from tests.dialled import CPU, recorded, turned

RESULT = record.RESULTS / "dial.json"
TARGETS = (1.0, 2.0, 8 / 3, 3.0, 3.5, 4.0, 5.0)
"""FFN experts a token; Nano was trained at 4."""
OF_FILES = 3
"""Every third of the held-out files is measured."""
REQUESTS, STEPS = 64, 200
"""Of each part of the response."""
PARTS = (("Python", 4.0), ("Python", 3.0), ("prose", 3.0), ("Python", 3.0))
"""Traffic and target of each part; 4 is what Nano was trained at."""
SEQUENCE, SETTLING = 256, 16
"""Tokens of a window; windows of trained text on which a bias settles."""
ROOT = Path(__file__).parents[1]


def main() -> None:
    held_out: float = json.loads((ROOT / "examples/nano/record/record.json").read_text())["settings"]["held_out"]
    corpus = standard_library(held_out)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    model = LongcatForCausalLM.from_checkpoint(CHECKPOINT)
    texts = list(corpus.held_out.values())[::OF_FILES]
    prose = encode(tokenizer, [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))])
    found = {
        "benchmark": "dial",
        **record.environment(),
        "corpus": corpus.digest(),
        "files": len(texts),
        "requests": REQUESTS,
        "parts": [{"traffic": traffic, "target": target, "steps": STEPS} for traffic, target in PARTS],
        "response": response(model, {"Python": encode(tokenizer, list(corpus.held_out.values())), "prose": prose}),
        "frontier": frontier(
            model,
            encode(tokenizer, list(corpus.train.values())),
            encode(tokenizer, texts),
            sum(len(text.encode()) for text in texts),
        ),
    }
    RESULT.write_text(json.dumps(found) + "\n")
    table = Table(*(str(name) for name in found["frontier"][0]))
    for row in found["frontier"]:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=160).print(table)
    for path in (RESULT, draw_response(found), draw_frontier(found)):
        print(path)


@torch.no_grad()
def response(model: LongcatForCausalLM, streams: dict[str, Tensor]) -> list[list[float]]:
    """The mean of FFN experts of each step, by layer."""
    means: list[list[float]] = []
    dial = Dial(model.config, PARTS[0][1], model.config.num_layers, CPU)
    for part, (traffic, target) in enumerate(PARTS):
        dial.turn(target)
        ids, cache = windows(streams[traffic], REQUESTS, STEPS, first=part), None
        with turned(model, dial) as chosen:
            for step in range(STEPS):
                cache = model(ids[:, step : step + 1], cache)[2]
                means.append([float((each >= 0).sum()) / REQUESTS for each in chosen])
    return means


def windows(stream: Tensor, count: int, length: int, first: int = 0) -> Tensor:
    """int64 [count, length], evenly from all over a stream; others for another `first`."""
    starts = torch.linspace(0, len(stream) - 5 * length, count).long() + first * length
    return stream[starts.unsqueeze(1) + torch.arange(length)].long()


@torch.no_grad()
def frontier(model: LongcatForCausalLM, trained: Tensor, stream: Tensor, num_bytes: int) -> list[dict[str, Any]]:
    """A row for each target, and one for the model as it is published."""
    published = [router.e_score_correction_bias.clone() for router in routers(model)]
    rows = [measured(model, "published", [0.0] * len(published), stream, num_bytes)]
    for target in TARGETS:
        biases = settle(model, windows(trained, SETTLING, SEQUENCE), target)
        rows.append(measured(model, target, biases, stream, num_bytes))
        for router, own in zip(routers(model), published, strict=True):
            router.e_score_correction_bias.copy_(own)
    return rows


def settle(model: LongcatForCausalLM, ids: Tensor, target: float) -> list[float]:
    """Turn the model's layers to the target, the first one first, as the next ones read what it makes."""
    biases = []
    for layer, router in enumerate(routers(model)):
        biases.append(settled_bias(recorded(model, ids).points[layer], target))
        router.e_score_correction_bias[model.config.n_routed_experts :] += biases[-1]
    return biases


def measured(
    model: LongcatForCausalLM, target: float | str, biases: list[float], stream: Tensor, num_bytes: int
) -> dict[str, Any]:
    found = measure.held_out(model, stream, num_bytes, SEQUENCE)
    mean = sum(found.ffn_experts) / len(found.ffn_experts)
    return {
        "target": target if isinstance(target, str) else round(target, 3),
        "ffn_experts": round(mean, 4),
        "activated_parameters": round(model.config.activated_parameters(mean)),
        "bits_per_byte": round(found.bits_per_byte, 5),
        "biases": [round(bias, 6) for bias in biases],
    }


def draw_response(found: dict[str, Any]) -> Path:
    drawn, axes = figure("FFN experts a token on LongCat-Nano, held by the dial", "step", f"mean of {REQUESTS} tokens")
    for layer, line in enumerate(zip(*found["response"], strict=True)):
        colour = (BLUE, GREY)[layer]
        axes.plot(line, color=colour, lw=0.5, alpha=0.35)
        means = [sum(line[max(0, n - 15) : n + 16]) / len(line[max(0, n - 15) : n + 16]) for n in range(len(line))]
        axes.plot(means, color=colour, lw=1.4, label=f"layer {layer}, mean of 31 steps")
    for part, (traffic, target) in enumerate(PARTS):
        label = "target" if part == 0 else None
        axes.plot([part * STEPS, (part + 1) * STEPS], [target, target], color=RED, lw=1, ls="--", label=label)
        axes.text((part + 0.5) * STEPS, 0.02, traffic, transform=axes.get_xaxis_transform(), ha="center", fontsize=8)
        if part:
            axes.axvline(part * STEPS, color=GREY, lw=0.6, ls=":")
    return save(drawn, record.RESULTS / "dial_response.png")


def draw_frontier(found: dict[str, Any]) -> Path:
    drawn, axes = figure(
        "What less compute costs LongCat-Nano", "FFN experts a token, held out", "bits a byte, held out"
    )
    published, *rows = found["frontier"]
    axes.plot([row["ffn_experts"] for row in rows], [row["bits_per_byte"] for row in rows], "o-", color=BLUE, ms=4)
    axes.plot([published["ffn_experts"]], [published["bits_per_byte"]], "o", color=RED, ms=7, label="as published")
    return save(drawn, record.RESULTS / "dial_frontier.png")


if __name__ == "__main__":
    typer.run(main)
