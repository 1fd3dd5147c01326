"""`python -m examples.nano.quantized --out DIR`: what LongCat-Nano loses in FP8, by the layers that stay in bf16."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from examples.nano import measure, publish
from examples.nano.corpus import Corpus, encode, standard_library
from examples.nano.training_record import machine
from longcat_cli import quantize
from longcat_cli.loading import read_tokenizer
from longcat_core.layers.experts import add_identity, ffn_by_expert, routed_experts
from longcat_core.quantization import Quantization
from longcat_core.recipe.calibration import fp8_inputs
from longcat_core.recipe.rule import Keep, Thresholds
from longcat_core.reference import LongcatForCausalLM, ZeroExpertMoE
from longcat_core.weights import checkpoint
from longcat_nano import CHECKPOINT

RESULT = "quantized"
_TOKENS, _SEQUENCE = 8192, 256
_FILES, _CHARACTERS = 64, 1500
_BUDGET = 500_000
_LOOSE = Thresholds(activation=5.0, relative=1.25, absolute=5.0)
"""With ours the intersection of Nano's two lists is empty."""


def command(
    out: Annotated[Path, typer.Option(help=f"Directory for `{RESULT}.json` and `{RESULT}.png`.")],
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on a CPU.")] = None,
    library: Annotated[Path | None, typer.Option(help="Python sources, as for the training.")] = None,
) -> None:
    """Convert the shipped LongCat-Nano with `longcat quantize`, calibrated on what it was trained on, and measure each
    checkpoint on what it was not."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
    out.mkdir(parents=True, exist_ok=True)
    source = Path(CHECKPOINT)
    held_out: float = json.loads((Path(__file__).parent / "record" / "record.json").read_text())["settings"]["held_out"]
    corpus = standard_library(held_out, library)
    rows = [_measured("bf16", source, corpus, [])]
    with tempfile.TemporaryDirectory() as directory:
        text = Path(directory) / "text.txt"
        text.write_text(calibration_text(corpus), encoding="utf-8")

        def convert(name: str, **options: Any) -> None:
            made = Path(directory) / name.replace(" ", "-")
            quantize.command(source, made, text=text, tokens=_TOKENS, **options)
            rows.append(_measured(name, made, corpus, rows))

        loose = {
            "extreme_activation": _LOOSE.activation,
            "large_relative_error": _LOOSE.relative,
            "large_absolute_error": _LOOSE.absolute,
        }
        convert("all in FP8", keep=Keep.none)
        convert("intersection", plot=out / f"{RESULT}.png")
        convert("intersection, loose thresholds", **loose)
        convert("union", keep=Keep.union)
        convert(f"budget of {_BUDGET:,} bytes", budget=_BUDGET)
    found = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(torch.device("cpu"), torch.get_num_threads()),
        "corpus": corpus.digest(),
        "calibration_tokens": _TOKENS,
        "loose_thresholds": asdict(_LOOSE),
        "rows": rows,
    }
    publish.write_json(out / f"{RESULT}.json", found)


def calibration_text(corpus: Corpus) -> str:
    """The beginnings of files that the model was trained on, from all over the library."""
    texts = list(corpus.train.values())
    return "".join(text[:_CHARACTERS] for text in texts[:: max(1, len(texts) // _FILES)])


def _measured(name: str, directory: Path, corpus: Corpus, before: list[dict[str, Any]]) -> dict[str, Any]:
    """Bits a byte of held-out text: with the weights as they are stored, as a CPU computes, and with the inputs of the
    layers in FP8 rounded as well, as a GPU does. What was measured `before` of the same checkpoint is taken."""
    config = checkpoint.read_config(directory)
    index = json.loads((directory / checkpoint.INDEX_NAME).read_text(encoding="utf-8"))
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    is_fp8 = config.quantization is not None
    what = {
        "bytes": index["metadata"]["total_size"],
        "is_fp8": is_fp8,
        "kept": raw["quantization_config"]["ignored_layers"] if is_fp8 else [],
    }
    found = next((row for row in before if row.items() >= what.items()), None)
    if found is None:
        texts = list(corpus.held_out.values())
        stream, num_bytes = encode(read_tokenizer(directory), texts), sum(len(text.encode()) for text in texts)
        model = LongcatForCausalLM.from_checkpoint(directory)
        weights = both = measure.held_out(model, stream, num_bytes, _SEQUENCE).bits_per_byte
        if config.quantization is not None:
            round_inputs(model, config.quantization)
            both = measure.held_out(model, stream, num_bytes, _SEQUENCE).bits_per_byte
        found = what | {"bits_per_byte_weights": weights, "bits_per_byte_weights_and_inputs": both}
    row = {"name": name} | {key: value for key, value in found.items() if key != "name"}
    bits = f"{row['bits_per_byte_weights']:.5f} and {row['bits_per_byte_weights_and_inputs']:.5f}"
    typer.echo(f"{name}: {row['bytes']:,} bytes, {bits} bits a byte")
    return row


def round_inputs(model: LongcatForCausalLM, quantization: Quantization) -> None:
    """From now on the linear layers in FP8 are given their inputs rounded to FP8, in blocks of 128 of a token."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and quantization.is_fp8(f"{name}.weight"):
            module.register_forward_pre_hook(lambda linear, given: fp8_inputs(given[0]))
        elif isinstance(module, ZeroExpertMoE) and quantization.is_fp8(f"{name}.experts.0.down_proj.weight"):
            layer, _, own = name.rpartition(".")
            model.get_submodule(layer).register_module(own, _RoundedMoE(module))


class _RoundedMoE(nn.Module):
    """In the place of a MoE, whose stacked experts are no linear layers."""

    def __init__(self, moe: ZeroExpertMoE) -> None:
        super().__init__()
        self.router, self.experts = moe.router, moe.experts

    def forward(self, x: Tensor) -> Tensor:
        tokens, experts = x.flatten(0, -2), self.experts
        routing = self.router(tokens)
        ffn = ffn_by_expert(
            len(experts.w13),
            gate_up=lambda expert, rows: F.linear(fp8_inputs(rows), experts.w13[expert]),
            down=lambda expert, rows: F.linear(fp8_inputs(rows), experts.w2[expert]),
        )
        routed = routed_experts(tokens, routing.ids, routing.weights, ffn)
        return add_identity(routed, tokens, routing.identity).view_as(x)


if __name__ == "__main__":
    typer.run(command)
