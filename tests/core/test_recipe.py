"""The recipe for FP8: what is measured of a layer, which layers are chosen, and with how much memory."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longcat_core import spellings
from longcat_core.inspection import routings
from longcat_core.recipe import choice
from longcat_core.recipe.calibration import CalibrationError, Measured, _Calibration, calibrate
from longcat_core.recipe.layers import DRAFT_LAYER, Layer, linear_layers
from longcat_core.recipe.rule import Keep, Score, Thresholds
from longcat_core.reference import DecoderLayer, LongcatForCausalLM
from longcat_core.weights.blocks import dequantize_blocks, quantize_blocks
from longcat_core.weights.names import all_tensors
from longcat_core.weights.streaming import PublishedTensors
from tests.cases import CASES, CHAT, DEFAULT, Case, published, write_checkpoint

CONFIG = DEFAULT
DOWN = "model.layers.0.mlps.1.down_proj"
EXPERT = "model.layers.1.mlp.experts.3"
LAYERS = linear_layers(CONFIG, all_tensors(CONFIG))
TOKENS = torch.randint(CONFIG.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))


def measured(directory: Path, tensors: dict[str, Tensor], tokens: Tensor = TOKENS) -> dict[str, Measured]:
    write_checkpoint(directory, CONFIG, tensors)
    return calibrate(PublishedTensors(directory, CONFIG), CONFIG, tokens)


# -- layers and groups ----------------------------------------------------------------------------------


def test_layers_of_a_group_are_what_engines_hold_together() -> None:
    groups: dict[str, list[str]] = {}
    for layer in LAYERS:
        groups.setdefault(layer.group, []).append(layer.name)
    layer = "model.layers.1"
    assert {len(groups[f"{layer}.mlp.experts"])} == {3 * CONFIG.n_routed_experts}
    attention, ffn = f"{layer}.self_attn.0", f"{layer}.mlps.0"
    for together in (
        [f"{attention}.q_a_proj", f"{attention}.kv_a_proj_with_mqa"],
        [f"{attention}.q_b_proj"],
        [f"{attention}.kv_b_proj"],
        [f"{attention}.o_proj"],
        [f"{ffn}.gate_proj", f"{ffn}.up_proj"],
        [f"{ffn}.down_proj"],
    ):
        assert together in groups.values()
    assert len(groups) == CONFIG.num_layers * (2 * 6 + 1) + 1
    assert {layer.kind for layer in LAYERS if layer.group == "model.mtp"} == {DRAFT_LAYER}


def test_the_bytes_of_chat_in_fp8_are_a_byte_a_weight_and_its_scales() -> None:
    config = spellings.read(CHAT)
    layers = {layer.name: layer for layer in linear_layers(config, all_tensors(config))}
    assert layers["model.layers.0.self_attn.1.kv_a_proj_with_mqa"].fp8_bytes == 576 * 6144 + 4 * 5 * 48
    assert len({layer.kind for layer in layers.values()}) == 5 + 3 + 3 + 1
    experts = [layer for layer in layers.values() if layer.group == "model.layers.27.mlp.experts"]
    assert sum(layer.elements for layer in experts) == 512 * config.expert_parameters


# -- what is measured -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_layer_is_measured_on_what_the_reference_gives_it(case: Case, tmp_path: Path) -> None:
    config = case.config
    write_checkpoint(tmp_path, config, case.published())
    tokens = torch.tensor(case.prompts(2, 12))
    found = calibrate(PublishedTensors(tmp_path, config), config, tokens)
    model = LongcatForCausalLM.from_checkpoint(tmp_path)
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> None:
        def hook(module: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
            inputs[name] = given[0].flatten(0, -2)

        model.get_submodule(name).register_forward_hook(hook)

    layers = linear_layers(config, all_tensors(config))
    assert found.keys() == {layer.name for layer in layers}
    dense = [layer.name for layer in layers if ".experts." not in layer.name]
    for name in dense:
        note(name)
    moe_inputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, given, output: moe_inputs.append(given[0].flatten(0, -2)))
    with torch.no_grad(), routings(model) as routed:
        _, hidden, _ = model(tokens)
        model.draft(hidden[:, :-1], tokens[:, 1:])
    weights = model.published()
    for n, (x, routing) in enumerate(zip(moe_inputs, routed, strict=True)):
        for e in range(config.n_routed_experts):
            prefix = f"model.layers.{n}.mlp.experts.{e}"
            rows = x[(routing.ids == e).any(dim=1)]
            gate, up = (F.linear(rows, weights[f"{prefix}.{part}_proj.weight"]) for part in ("gate", "up"))
            inputs |= {f"{prefix}.gate_proj": rows, f"{prefix}.up_proj": rows}
            inputs[f"{prefix}.down_proj"] = F.silu(gate) * up
    for name, x in inputs.items():
        weight, each = weights[f"{name}.weight"], found[name]
        in_fp8 = dequantize_blocks(*quantize_blocks(weight))
        assert each.rows == len(x), name
        assert each.weight_error == pytest.approx(float((in_fp8 - weight).norm() / weight.norm()), rel=1e-4), name
        if len(x):
            rounded = dequantize_blocks(*quantize_blocks(x, (1, 128)), block=(1, 128))
            error, output = F.linear(rounded, in_fp8) - F.linear(x, weight), F.linear(x, weight)
            assert each.largest_input == pytest.approx(float(x.abs().max()), rel=1e-3), name
            # A number at the edge between two of FP8 may be rounded to either.
            assert each.output_error == pytest.approx(float(error.norm() / output.norm()), rel=0.05), name
            assert each.output_error_rms == pytest.approx(float(error.square().mean().sqrt()), rel=0.05), name


def test_one_token_is_enough_to_measure_on(tmp_path: Path) -> None:
    found = measured(tmp_path, published(CONFIG), TOKENS[:1, :1])
    assert all(each.rows == 1 for name, each in found.items() if ".experts." not in name)
    assert not any(name.startswith("model.mtp.") for name in found), "which predicts from two tokens"


def test_experts_that_no_token_took_are_measured_by_their_weights_alone(tmp_path: Path) -> None:
    tensors = published(CONFIG)
    tensors["model.layers.1.mlp.router.e_score_correction_bias"][3] = -9.0
    found = measured(tmp_path, tensors)
    for part in ("gate", "up", "down"):
        each = found[f"{EXPERT}.{part}_proj"]
        assert each == Measured(0, 0.0, each.weight_error, 0.0, 0.0)
        assert each.weight_error == pytest.approx(0.026, abs=0.003), "what rounding to 3 bits of mantissa costs"


def test_inputs_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    tensors = published(CONFIG)
    tensors["model.layers.1.self_attn.0.q_a_proj.weight"][0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"^model.layers.1.self_attn.0.q_b_proj: inputs that are not finite"):
        measured(tmp_path, tensors)


# -- which layers are chosen ----------------------------------------------------------------------------


def planted(ffn: str, magnitude: float, compensated: bool) -> dict[str, Tensor]:
    """Weights with which one channel between an FFN's projections is about `magnitude`; `compensated`: what it adds
    to the output is as it was."""
    tensors = published(CONFIG)
    tensors[f"{ffn}.up_proj.weight"][5] *= magnitude
    if compensated:
        tensors[f"{ffn}.down_proj.weight"][:, 5] /= magnitude
    return tensors


@pytest.mark.parametrize("compensated", [True, False])
@pytest.mark.parametrize("ffn", ["model.layers.0.mlps.1", "model.layers.1.mlps.0", EXPERT])
def test_a_down_projection_with_inputs_of_a_million_is_kept_and_nothing_else(
    ffn: str, compensated: bool, tmp_path: Path
) -> None:
    found = measured(tmp_path, planted(ffn, 1e6, compensated))
    assert found[f"{ffn}.down_proj"].largest_input > 1e5
    scores = choice.scores(LAYERS, found, Thresholds())
    group = {layer.name: layer.group for layer in LAYERS}
    assert choice.kept(LAYERS, scores, Keep.intersection) == {group[f"{ffn}.down_proj"]}
    assert choice.kept(LAYERS, scores, Keep.activation) == {group[f"{ffn}.down_proj"]}
    # The projection before it has the large numbers in its weights and outputs, but not in its inputs.
    wanted = {group[f"{ffn}.down_proj"], group[f"{ffn}.up_proj"]}
    assert wanted <= choice.kept(LAYERS, scores, Keep.error) == choice.kept(LAYERS, scores, Keep.union)


def test_of_a_model_without_outliers_nothing_is_kept(tmp_path: Path) -> None:
    scores = choice.scores(LAYERS, measured(tmp_path, published(CONFIG)), Thresholds())
    assert choice.kept(LAYERS, scores, Keep.union) == set()


@pytest.mark.parametrize(
    ("score", "kept"),
    [
        (Score(1.0, 1.0), {"intersection", "union", "activation", "error"}),
        (Score(1.0, 0.99), {"union", "activation"}),
        (Score(0.99, 1.0), {"union", "error"}),
        (Score(0.99, 0.99), set()),
        (Score(None, 1.0), {"intersection", "union", "error"}),
        (Score(None, 0.99), set()),
    ],
)
def test_lists_are_joined_as_their_name_says(score: Score, kept: set[str]) -> None:
    assert {keep.value for keep in Keep if score.is_kept(keep)} == kept


def test_a_group_is_kept_for_one_layer_that_is_in_both_lists_and_not_for_two_in_one_each() -> None:
    first, second = (Layer(name, "experts down_proj", "experts", (8, 8)) for name in "ab")
    apart = {"a": Score(2.0, 0.5), "b": Score(0.5, 2.0)}
    assert choice.kept([first, second], apart, Keep.intersection) == set()
    assert choice.kept([first, second], {**apart, "b": Score(2.0, 2.0)}, Keep.intersection) == {"experts"}


def test_each_value_is_compared_with_its_median() -> None:
    layers = [Layer(f"{kind}{n}", kind, f"{kind}{n}", (8, 8)) for kind in "ab" for n in range(3)]
    layers.append(Layer("draft", DRAFT_LAYER, "draft", (8, 8)))
    usual = Measured(rows=1, largest_input=2.0, weight_error=0.02, output_error=0.04, output_error_rms=1.0)
    found = {layer.name: usual for layer in layers} | {"draft": replace(usual, largest_input=1e9)}
    found |= {f"b{n}": replace(usual, output_error_rms=100.0) for n in range(3)}
    thresholds = Thresholds(activation=4.0, relative=2.0, absolute=5.0)
    assert choice.scores(layers, found, thresholds) == {
        layer.name: Score(activation=0.25, error=0.5) for layer in layers if layer.name != "draft"
    }
    changes = {"largest_input": 16.0, "weight_error": 0.06, "output_error": 0.16, "output_error_rms": 10.0}
    wanted = [Score(2.0, 0.5), Score(0.25, 1.5), Score(0.25, 2.0), Score(0.25, 2.0)]
    for (field, value), score in zip(changes.items(), wanted, strict=True):
        changed = found | {"a0": replace(usual, **{field: value})}
        assert choice.scores(layers, changed, thresholds)["a0"] == score
    unreached = found | {"a0": Measured(0, 0.0, 0.06, 0.0, 0.0)}
    assert choice.scores(layers, unreached, thresholds)["a0"] == Score(None, 1.5)


def test_a_budget_goes_to_the_greatest_error_a_byte_and_is_not_exceeded() -> None:
    layers = [Layer(name, "attention o_proj", name, (8, 8)) for name in "abcd"]
    errors = {"a": 0.04, "b": 0.03, "c": 0.02, "d": 0.0}
    found = {name: Measured(1, 1.0, 0.02, error, 1.0) for name, error in errors.items()}
    found["d"] = Measured(0, 0.0, 0.05, 0.0, 0.0)
    extra = {"a": 100, "b": 10, "c": 10, "d": 10}
    expected = {0: "", 9: "", 10: "d", 25: "bd", 30: "bcd", 129: "bcd", 130: "abcd"}
    layers.append(Layer("draft", DRAFT_LAYER, "draft", (8, 8)))

    def kept(budget: int) -> str:
        return "".join(sorted(choice.within_budget(layers, found, lambda layer: extra[layer.name], budget)))

    assert {budget: kept(budget) for budget in expected} == expected


# -- memory ---------------------------------------------------------------------------------------------


def test_weights_leave_memory_as_soon_as_a_module_has_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, published(CONFIG))
    tensors, held = PublishedTensors(tmp_path, CONFIG), []

    def look(name: str) -> None:
        held.append({key for key, each in layer.named_parameters() if not each.is_meta})

    calibration = _Calibration(tensors, CONFIG, look)
    layer = calibration._streamed(DecoderLayer, "model.layers.0")
    cos = sin = torch.ones(1, 4, CONFIG.qk_rope_head_dim // 2)
    with torch.no_grad():
        layer(torch.ones(2, 4, CONFIG.hidden_size), cos, sin, None)
    assert len(held) == 2 * 8 + 3 * CONFIG.n_routed_experts
    assert held == [set()] * len(held)


_LARGE = replace(
    DEFAULT, vocab_size=300, hidden_size=512, num_layers=3, n_routed_experts=64, expert_ffn_hidden_size=512
)
_MEASURE = """
import json, re, sys, torch
from pathlib import Path
from longcat_core import spellings
from longcat_core.recipe.calibration import calibrate
from longcat_core.recipe.conversion import Conversion, Source
from longcat_core.reference import DecoderLayer
torch.set_num_threads(1)
# The first use brings libraries into memory.
torch.randn(512, 512) @ torch.randn(512, 512)
with torch.device("meta"):
    DecoderLayer(spellings.read(json.loads((Path(sys.argv[1]) / "config.json").read_text())))
# Of this program alone: what getrusage tells begins with the memory of the process that started it.
peak = lambda: int(re.search("VmHWM: *\\t* *([0-9]+) kB", Path("/proc/self/status").read_text())[1]) / 1024
source = Source(Path(sys.argv[1]))
before = peak()
if sys.argv[3] == "calibrate":
    calibrate(source.tensors, source.config, torch.arange(64).view(2, 32))
else:
    Path(sys.argv[2]).mkdir()
    Conversion(source, (), mtp_in_fp8=True).write(Path(sys.argv[2]))
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 MB in bf16, whose largest tensors have 0.5 MB."""
    directory = tmp_path_factory.mktemp("large")
    tensors = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in all_tensors(_LARGE).items()}
    return write_checkpoint(directory, _LARGE, tensors)


@pytest.mark.parametrize("step", ["calibrate", "write"])
def test_a_model_takes_the_memory_of_a_few_of_its_tensors(step: str, large: Path, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in large.glob("*.safetensors")) / 2**20
    assert size > 280
    command = [sys.executable, "-c", _MEASURE, str(large), str(tmp_path / "out"), step]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) < 40, "MiB more than at the start"
