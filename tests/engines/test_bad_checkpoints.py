"""What cannot be served is refused before any worker starts, by a message that names it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import LlamaConfig

from longcat_core import spellings
from longcat_core.weights import checkpoint, names, plan
from tests.cases import CASES, Case, write_checkpoint
from tests.harness import engine
from tests.oracle import assert_greedy_equal, greedy, oracle
from tests.server import START_TIMEOUT_S, processes_of, started

CASE = CASES["default"]
RAW = spellings.published(CASE.config)
TENSORS = CASE.published()
NEEDED = [
    *("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "ffn_hidden_size", "expert_ffn_hidden_size"),
    *("n_routed_experts", "moe_topk", "max_position_embeddings", "routed_scaling_factor", "rope_theta"),
]
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
NORM, HEAD, EXPERT = "model.norm.weight", "lm_head.weight", "model.layers.1.mlp.experts.3.up_proj.weight"


def refusal(directory: Path, **engine_args: Any) -> str:
    """The message; an engine may wrap what is raised within its configuration classes."""
    with pytest.raises((ValueError, RuntimeError)) as refused:
        engine.configure(directory, **engine_args)
    return str(refused.value)


def in_fp8(tensors: dict[str, Tensor], *, scales: bool) -> dict[str, Tensor]:
    """The experts in FP8, with a scale for every block of 128 x 128 or without any."""
    changed = dict(tensors)
    for name, tensor in tensors.items():
        if plan.expert_of(name) is not None:
            changed[name] = tensor.to(torch.float8_e4m3fn)
            if scales:
                changed[name + names.SCALE_SUFFIX] = torch.ones([-(-size // 128) for size in tensor.shape])
    return changed


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", CASE.config, TENSORS)


def with_config(directory: Path, raw: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


# -- the configuration -------------------------------------------------------------------------------


def test_a_good_checkpoint_is_not_refused(good: Path) -> None:
    assert engine.configure(good) == CASE.config


@pytest.mark.parametrize("field", NEEDED)
def test_a_needed_field_that_is_missing_is_named(field: str, good: Path) -> None:
    message = refusal(with_config(good, {key: value for key, value in RAW.items() if key != field}))
    problems = [line.strip() for line in message.splitlines() if "missing" in line or "wanted" in line]
    assert len(problems) == 1, message
    assert field in problems[0].partition(":")[0].split(" or ")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"zero_expert_type": "drop"}, "zero_expert_type: 'drop', wanted 'identity'"),
        ({"zero_expert_num": -1}, "zero_expert_num: -1, wanted an integer of at least 0"),
        ({"router_temperature": 2}, "router_temperature: 2 is an unknown router option; known are router_bias,"),
        ({"router_bias": True}, "router_bias: True, wanted False"),
        ({"norm_topk_prob": True}, "norm_topk_prob: True, wanted False"),
        ({"scoring_func": "sigmoid"}, "scoring_func: 'sigmoid', wanted 'softmax'"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu', wanted 'silu'"),
        ({"hidden_size": "64"}, "hidden_size: '64', wanted a positive integer"),
        ({"moe_topk": 13}, "moe_topk: 13, wanted at most the 12 experts there are"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok: 3 contradicts moe_topk: 4; remove one"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, "rope_type: 'linear', wanted 'default' or 'yarn'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_that_cannot_be_served_is_named_with_its_value_and_what_is_wanted(
    change: dict[str, Any], wanted: str, good: Path
) -> None:
    assert wanted in refusal(with_config(good, RAW | change))


# -- the tensors -------------------------------------------------------------------------------------


def test_missing_extra_and_misshapen_tensors_are_all_listed(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in TENSORS.items() if name not in (HEAD, EXPERT)}
    tensors |= {NORM: torch.zeros(65), "model.norm.bias": torch.zeros(64)}
    message = refusal(write_checkpoint(tmp_path, CASE.config, tensors))
    assert "does not match its config.json (4 problems)" in message
    assert f"missing: {HEAD} [320, 64]" in message
    assert f"missing: {EXPERT} [32, 64]" in message
    assert f"misshapen: {NORM} is [65], wanted [64]" in message
    assert "extra: model.norm.bias [64]" in message


def test_a_config_of_another_depth_than_the_tensors_is_refused(good: Path) -> None:
    message = refusal(with_config(good, RAW | {"num_layers": 1}))
    assert "extra: model.layers.1.mlp.experts.0.down_proj.weight [64, 32]" in message
    assert "model.layers.0" not in message


@pytest.fixture
def shards(good: Path) -> list[Path]:
    (good / "model.safetensors").unlink()
    checkpoint.save(TENSORS, good, max_shard_size=300_000)
    found = sorted(good.glob("*.safetensors"))
    assert len(found) > 2
    engine.configure(good)
    return found


def test_a_truncated_shard_is_named(good: Path, shards: list[Path]) -> None:
    size = shards[1].stat().st_size
    with shards[1].open("r+b") as shard:
        shard.truncate(size - 1)
    message = refusal(good)
    assert f"{shards[1]}: truncated or not safetensors at {size - 1} bytes" in message
    assert not any(shard.name in message for shard in (shards[0], *shards[2:]))


def test_missing_shards_are_named(good: Path, shards: list[Path]) -> None:
    for shard in shards[:2]:
        shard.unlink()
    message = refusal(good)
    assert f"names shards that do not exist: {shards[0].name}, {shards[1].name}; download them again" in message
    assert shards[2].name not in message


def test_a_directory_without_safetensors_is_refused_unless_the_weights_are_to_be_random(good: Path) -> None:
    (good / "model.safetensors").unlink()
    assert f"{good}: no *.safetensors" in refusal(good)
    engine.configure(good, load_format="dummy")


def test_fp8_weights_without_scales_are_all_named(tmp_path: Path) -> None:
    message = refusal(write_checkpoint(tmp_path, CASE.config, in_fp8(TENSORS, scales=False)))
    experts = [name for name in TENSORS if plan.expert_of(name) is not None]
    assert f"({len(experts)} problems)" in message
    for name in experts:
        assert f"missing: {name}_scale_inv, the scales of an FP8 weight" in message


# -- the deployment ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"fmt": "e5m2"}, "quantization_config.fmt: 'e5m2', wanted 'e4m3'"),
        ({"weight_block_size": None}, "quantization_config.weight_block_size: none, wanted two numbers"),
        ({"weight_block_size": None, "activation_scheme": "static"}, "activation_scheme: 'static', wanted 'dynamic'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, "quantization: "),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "quantization: "),
        ({"quant_method": "compressed-tensors", "config_groups": {}, "format": "float-quantized"}, "quantization: "),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quantization: "),
    ],
    ids=lambda value: value.get("quant_method", next(iter(value))) if isinstance(value, dict) else "",
)
def test_a_quantisation_that_cannot_be_served_on_a_cpu_is_named(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    raw = {**RAW, "quantization_config": {**FP8, **changes}}
    message = refusal(write_checkpoint(tmp_path, CASE.config, TENSORS, raw), dtype="bfloat16")
    assert problem in message
    assert "give such a checkpoint, or one in bf16, and leave --quantization out" in message


def test_a_checkpoint_in_bf16_is_not_quantised_here(good: Path) -> None:
    assert "quantization: 'fp8', wanted none, or the 'fp8' of" in refusal(good, quantization="fp8", dtype="bfloat16")


@pytest.mark.parametrize("version", engine.UNSUPPORTED)
def test_an_engine_of_another_version_is_refused_for_longcat_and_for_nothing_else(
    version: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.RECORD, "version", lambda: Version(version))
    message = refusal(good)
    wanted = f"on {engine.NAME} {engine.RECORD.supported_text}, found {version}; install such a {engine.NAME}"
    assert wanted in message
    llama = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
    llama.architectures = ["LlamaForCausalLM"]
    llama.save_pretrained(tmp_path / "llama")
    assert engine.configure(tmp_path / "llama") is None


@pytest.mark.parametrize("version", engine.SUPPORTED)
def test_an_engine_of_a_supported_version_is_not_refused(
    version: str, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.RECORD, "version", lambda: Version(version))
    engine.configure(good)


# -- the real command --------------------------------------------------------------------------------


def failed_server(directory: Path) -> str:
    """The output of the stock command that ends by itself, with an error and without having started an engine."""
    log = directory.with_name("server.log")
    with started(engine.command(directory), log) as process:
        assert process.wait(START_TIMEOUT_S) != 0
        assert processes_of(process) == []
    output = log.read_text()
    assert engine.STARTED not in output
    return output


def test_the_server_ends_with_every_bad_tensor_named_and_no_engine_started(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != HEAD} | {NORM: torch.zeros(65)}
    output = failed_server(write_checkpoint(tmp_path / "checkpoint", CASE.config, tensors))
    assert f"missing: {HEAD} [320, 64]" in output
    assert f"misshapen: {NORM} is [65], wanted [64]" in output


def test_the_server_ends_with_a_bad_option_named_and_no_engine_started(good: Path) -> None:
    output = failed_server(with_config(good, RAW | {"zero_expert_type": "drop"}))
    assert "zero_expert_type: 'drop', wanted 'identity'" in output


# -- weights that come from a loader -----------------------------------------------------------------


def test_an_update_of_a_running_model_is_in_the_next_token_or_not_at_all(
    checkpoint_of: Callable[[Case], Path],
) -> None:
    """Of one layer, with its experts one by one or stacked, as trainers with transformers 5 send them."""
    changed = {name: tensor for name, tensor in CASE.published(seed=1).items() if name.startswith("model.layers.1.")}
    prompt = CASE.prompts(1, 20)[0]
    before, after = (greedy(oracle(CASE.config, tensors), prompt, 4) for tensors in (TENSORS, TENSORS | changed))
    assert [choice.token for choice in before] != [choice.token for choice in after]
    with engine.serving(checkpoint_of(CASE), prefix_caching=False) as served:
        assert_greedy_equal(served.greedy([prompt], 4)[0], before)
        with pytest.raises(Exception, match=r"extra: model\.norm\.bias"):
            served.update(changed | {"model.norm.bias": torch.zeros(64)})
        assert_greedy_equal(served.greedy([prompt], 4)[0], before)
        served.update(changed)
        assert_greedy_equal(served.greedy([prompt], 4)[0], after)
        served.update(with_stacked_experts(TENSORS, layer=1))
        assert_greedy_equal(served.greedy([prompt], 4)[0], before)


def with_stacked_experts(tensors: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """A layer's tensors as transformers 5 holds them."""
    prefix = f"model.layers.{layer}."
    of_layer = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    gate, up, down = (
        torch.stack([of_layer.pop(f"{prefix}mlp.experts.{e}.{part}_proj.weight") for e in range(8)])
        for part in ("gate", "up", "down")
    )
    gate_up = torch.cat((gate, up), dim=1)
    return of_layer | {f"{prefix}mlp.experts.gate_up_proj": gate_up, f"{prefix}mlp.experts.down_proj": down}
