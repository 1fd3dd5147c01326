"""Nano in FP8: inputs are rounded where the weights are in FP8, and what was measured is of the shipped checkpoint."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.nano import quantized
from examples.nano.corpus import Corpus
from longcat_core.inspection import routings
from longcat_core.layers.experts import moe
from longcat_core.quantization import Quantization
from longcat_core.recipe.calibration import fp8_inputs
from longcat_core.reference import LongcatForCausalLM
from longcat_core.weights.blocks import dequantize_blocks, quantize_blocks
from longcat_nano import CHECKPOINT
from tests.cases import DEFAULT, published

RESULTS = Path(quantized.__file__).parent / "results" / f"{quantized.RESULT}.json"
OUTPUT, EXPERTS = "model.layers.0.self_attn.1.o_proj", "model.layers.1.mlp"
TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture
def model() -> LongcatForCausalLM:
    made = LongcatForCausalLM(DEFAULT).eval()
    made.load_published(published(DEFAULT))
    return made


def test_inputs_are_rounded_by_blocks_of_128_of_a_token() -> None:
    x = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(0))
    rows = [dequantize_blocks(*quantize_blocks(part)) for part in x.flatten(0, 1).split(1)]
    assert torch.equal(fp8_inputs(x), torch.cat(rows).view_as(x))


@torch.no_grad()
def test_a_model_none_of_whose_layers_are_in_fp8_is_left_alone(model: LongcatForCausalLM) -> None:
    before = model(TOKENS)[0]
    quantized.round_inputs(model, Quantization("fp8", ignored=("model",)))
    assert torch.equal(model(TOKENS)[0], before)


@torch.no_grad()
def test_the_inputs_of_layers_in_fp8_are_rounded(model: LongcatForCausalLM) -> None:
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> None:
        def hook(module: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
            seen[name] = (given[0], output)

        model.get_submodule(name).register_forward_hook(hook)

    attentions = [f"model.layers.{n}.self_attn.{i}" for n in range(2) for i in range(2)]
    others = [name for name in attentions if name not in OUTPUT]
    parts = [
        f"model.layers.0.self_attn.1.{part}" for part in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
    ]
    ffns = [f"model.layers.{n}.mlps" for n in range(2)]
    ignored = (*others, *parts, *ffns, "model.layers.0.mlp", "model.mtp")
    note(f"{OUTPUT}")
    model(TOKENS)
    exact, _ = seen[OUTPUT]
    quantized.round_inputs(model, Quantization("fp8", ignored=ignored))
    note(EXPERTS)
    with routings(model) as noted:
        model(TOKENS)
    assert len(noted) == DEFAULT.num_layers, "the tokens are counted once"
    linear = model.get_submodule(OUTPUT)
    assert torch.equal(seen[OUTPUT][1], F.linear(fp8_inputs(exact), linear.weight))
    x, output = seen[EXPERTS]
    layer = model.get_submodule(EXPERTS)
    plain = moe(x.flatten(0, 1), noted[1], layer.experts.w13, layer.experts.w2).view_as(x)
    assert 0.005 < float((output - plain).norm() / plain.norm()) < 0.05


def test_a_text_to_calibrate_on_is_of_what_the_model_was_trained_on() -> None:
    corpus = Corpus({f"{n:03}.py": f"{n} " * 2000 for n in range(300)}, {"held_out.py": "held out"})
    text = quantized.calibration_text(corpus)
    assert text.startswith("0 0 ")
    assert "299 " not in text
    assert "296 " in text
    assert "held" not in text


def test_the_committed_results_are_of_the_shipped_checkpoint() -> None:
    rows = {row["name"]: row for row in json.loads(RESULTS.read_text())["rows"]}
    index = json.loads((Path(CHECKPOINT) / "model.safetensors.index.json").read_text())
    assert rows["bf16"]["bytes"] == index["metadata"]["total_size"]
    record = json.loads((RESULTS.parents[1] / "record" / "record.json").read_text())
    assert rows["bf16"]["bits_per_byte_weights"] == pytest.approx(record["results"]["bits_per_byte"], rel=1e-5)
    assert rows["all in FP8"]["kept"] == []
    assert (
        rows["all in FP8"]["bytes"] <= rows["intersection"]["bytes"] <= rows["union"]["bytes"] < rows["bf16"]["bytes"]
    )


def test_every_recipe_is_converted_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus({f"{n}.py": "def f(x):\n    return x\n" * 9 for n in range(3)}, {"held_out.py": "import os\n" * 9})
    monkeypatch.setattr(quantized, "standard_library", lambda held_out, root: corpus)
    monkeypatch.setattr(quantized, "_TOKENS", 64)
    quantized.command(tmp_path, threads=1)
    found = json.loads((tmp_path / "quantized.json").read_text())
    committed = json.loads(RESULTS.read_text())
    assert found.keys() == committed.keys()
    assert [row["name"] for row in found["rows"]] == [row["name"] for row in committed["rows"]]
    assert [row.keys() for row in found["rows"]] == [row.keys() for row in committed["rows"]]
    exact, all_fp8 = found["rows"][:2]
    assert exact["bits_per_byte_weights"] == exact["bits_per_byte_weights_and_inputs"]
    rounded = [all_fp8["bits_per_byte_weights"], all_fp8["bits_per_byte_weights_and_inputs"]]
    assert len({exact["bits_per_byte_weights"], *rounded}) == 3
    assert (tmp_path / "quantized.png").read_bytes().startswith(b"\x89PNG")
