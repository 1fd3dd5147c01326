"""FP8 in SGLang: built, loaded and updated, with core's kernels on a CPU and in the engine's own layers as on a GPU."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod, Fp8MoEMethod
from torch import Tensor, nn

from longcat_core.layers.experts import grouped_ffn, routed_experts
from longcat_core.quantization import Quantization
from longcat_core.weights.blocks import FP8, dequantize_blocks
from longcat_sglang import model
from longcat_sglang.devices.cpu.device import Cpu
from longcat_sglang.devices.cuda.device import Cuda
from longcat_sglang.quantization import LongcatFp8Config
from tests import fp8
from tests.cases import drafting_tensors, write_checkpoint
from tests.fp8 import dequantised, released
from tests.oracle import oracle, oracle_logits, typical_error
from tests.sglang.engine import serving

EXPERTS = "model.layers.1.mlp.experts"
MIXED = Quantization(
    "fp8",
    ignored=("model.layers.0.self_attn.1.kv_a_proj_with_mqa", "model.layers.1.mlps.0.down_proj", EXPERTS),
)
CONFIG = replace(fp8.CONFIG, kv_lora_rank=128, qk_nope_head_dim=64, quantization=MIXED)
PLAIN = replace(CONFIG, quantization=None)
PROMPT = torch.randint(CONFIG.vocab_size, (60,), generator=torch.Generator().manual_seed(0)).tolist()


def with_names_of_weights(directory: Path, patch: pytest.MonkeyPatch) -> None:
    """In SGLang's process: write the FP8 parameters of each model that is loaded into `directory`, by its class."""

    def loaded(self: Any) -> None:
        post_load_weights(self)
        names = [name for name, parameter in self.named_parameters() if parameter.dtype == FP8]
        (directory / f"{type(self).__name__}.json").write_text(json.dumps(names))

    post_load_weights = model.LongcatCausalLM.post_load_weights
    patch.setattr(model.LongcatCausalLM, "post_load_weights", loaded)


def with_layers_of_a_gpu(directory: Path, patch: pytest.MonkeyPatch) -> None:
    """Also: layers as on a GPU, whose products are those of the dequantised weights."""

    def weight_of(layer: Any, name: str) -> Tensor:
        weight, scales = getattr(layer, name), getattr(layer, f"{name}_scale_inv")
        parts = weight.unsqueeze(0) if weight.ndim == 2 else weight
        pairs = zip(parts, scales.view(len(parts), *scales.shape[-2:]), strict=True)
        return torch.stack([dequantize_blocks(*pair, torch.bfloat16) for pair in pairs]).view(weight.shape)

    def apply_linear(self: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, weight_of(layer, "weight"), bias)

    def apply_experts(self: Any, layer: Any, dispatch_output: Any) -> Any:
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

        weights, ids, _ = dispatch_output.topk_output
        ffn = grouped_ffn(weight_of(layer, "w13_weight"), weight_of(layer, "w2_weight"))
        return StandardCombineInput(routed_experts(dispatch_output.hidden_states, ids, weights, ffn))

    def expert_arguments(self: Any, quant_config: LongcatFp8Config | None) -> dict[str, Any]:
        return arguments(self, quant_config) if quant_config is None else {"quant_method": None}

    arguments = Cpu.expert_arguments
    patch.setattr(Cpu, "fp8_kernels", Cuda.fp8_kernels)
    patch.setattr(Cpu, "choose_kernels", Cuda.choose_kernels)
    patch.setattr(Cpu, "expert_arguments", expert_arguments)
    with_names_of_weights(directory, patch)
    for method, apply in ((Fp8LinearMethod, apply_linear), (Fp8MoEMethod, apply_experts)):
        patch.setattr(method, "process_weights_after_loading", lambda *_: None)
        patch.setattr(method, "apply", apply)


def truth_of(tensors: dict[str, Tensor]) -> Tensor:
    return oracle_logits(oracle(PLAIN, dequantised(tensors)), torch.tensor([PROMPT]))[0, :-1].log_softmax(dim=-1)


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """On two ranks, drafting with the MTP layer: errors before and after all weights are replaced by others."""
    directory = tmp_path_factory.mktemp("fp8")
    releases = [released(CONFIG, drafting_tensors(CONFIG, seed)) for seed in (0, 1)]
    truths = [truth_of(tensors) for tensors in releases]
    write_checkpoint(directory, CONFIG, releases[0])
    is_gpu = request.param == "gpu"
    broken = partial(with_layers_of_a_gpu if is_gpu else with_names_of_weights, directory)
    with serving(directory, dtype="bfloat16", tensor_parallel=2, draft_tokens=2, broken=broken) as served:

        def errors() -> list[float]:
            logits = served.log_softmax(PROMPT, CONFIG.vocab_size)
            return [typical_error(logits, truth) for truth in truths]

        (answer,) = served.speculated([PROMPT[:20]], 16)
        before = errors()
        weight = "model.layers.0.mlps.0.down_proj.weight"
        refused = served.refused_update({weight: dequantised(releases[1])[weight]})
        served.update(releases[1])
        yield {
            "device": request.param,
            "before": before,
            "refused": refused,
            "after": errors(),
            "accepted": answer.accepted,
            **{file.stem: json.loads(file.read_text()) for file in directory.glob("Longcat*.json")},
        }


def test_sglangs_layers_hold_in_fp8_what_core_says(found: dict[str, Any]) -> None:
    """On each of two ranks `q_b_proj` has 192 rows, which cuts a block; half of a fused layer is not enough."""
    absorbed = ("kv_b_proj",) if found["device"] == "gpu" else ()  # on a CPU attention has its numbers in bf16
    attention, ffn = (*absorbed, "o_proj"), ("gate_up_proj", "down_proj")
    fused = model.LAYOUT.fused_qkv_a
    wanted = {f"self_attn.{i}.{name}" for i in range(2) for name in attention} | {
        f"self_attn.{i}.{fused}" for i in (0, 1)
    }
    wanted |= {f"mlps.{i}.{name}" for i in range(2) for name in ffn}
    layers = {f"model.layers.{n}.{name}.weight" for n in range(CONFIG.num_layers) for name in wanted}
    layers -= {f"model.layers.0.self_attn.1.{fused}.weight", "model.layers.1.mlps.0.down_proj.weight"}
    experts = {
        f"model.layers.{n}.mlp.experts.{name}_weight"
        for n in (0, *range(2, CONFIG.num_layers))
        for name in ("w13", "w2")
    }
    assert set(found["LongcatFlashForCausalLM"]) == layers | experts
    mtp = {f"self_attn.{name}" for name in (*attention, fused)} | {f"transformer_layer.mlp.{name}" for name in ffn}
    assert set(found["LongcatFlashMTP"]) == {f"model.layers.0.{name}.weight" for name in (*mtp, "eh_proj")}


def test_weights_in_sglangs_layers_are_the_published_ones(found: dict[str, Any]) -> None:
    assert found["before"][0] < BF16 < found["before"][1] / 10
    assert sum(found["accepted"]) > 0.4 * 2 * len(found["accepted"])


def test_an_update_of_fp8_weights_is_in_the_next_logits(found: dict[str, Any]) -> None:
    assert found["after"][1] < BF16 < found["after"][0] / 10


def test_an_update_in_another_precision_is_refused(found: dict[str, Any]) -> None:
    assert "0.mlps.0.down_proj.weight is torch.float32, wanted torch.float8_e4m3fn" in found["refused"]


BF16 = 0.006
"""What rounding to bf16 costs these models, with room for twice as much."""
