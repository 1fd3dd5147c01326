"""Both engines read from the `config.json` of `longcat quantize` which of their layers are in FP8."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from longcat_core.recipe.conversion import Conversion, Source
from longcat_core.recipe.layers import DRAFT_LAYER
from longcat_core.weights import plan
from tests.cases import DEFAULT, in_dtype, published, write_checkpoint
from tests.harness import ENGINE, engine

LAYERS_PACKAGE = {"vllm": "vllm.model_executor.layers", "sglang": "sglang.srt.layers"}[ENGINE]
FP8: Any = import_module(f"{LAYERS_PACKAGE}.quantization.fp8")
MODEL: Any = import_module(f"{engine.PACKAGE}.model")
KEPT = ("fused_qkv_a_proj", "q_b_proj", "kv_b_proj", "o_proj", "gate_up_proj", "down_proj", "experts")


@pytest.mark.parametrize("part", KEPT)
def test_a_layer_kept_in_bf16_is_built_without_fp8_and_no_other(part: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "source", DEFAULT, in_dtype(published(DEFAULT), torch.bfloat16))
    source = Source(directory)
    groups = {layer.name: layer.group for layer in source.layers if layer.kind != DRAFT_LAYER}
    kept = next(group for group in groups.values() if group.startswith("model.layers.1.") and group.endswith(part))
    raw = json.loads(json.dumps(Conversion(source, {kept}, mtp_in_fp8=True).config_json()))
    config = FP8.Fp8Config.from_config(raw["quantization_config"])
    targets = plan.load_plan(DEFAULT, MODEL.LAYOUT)
    found = {}
    for name, group in groups.items():
        # An engine asks for its own module; for all experts of a layer at once, below this one.
        module = targets[f"{name}.weight"].parameter.rsplit(".", 1)[0].removesuffix(".routed_experts")
        mapping = MODEL.LongcatCausalLM.packed_modules_mapping
        found[group] = FP8.is_layer_skipped(module, config.ignored_layers, fused_mapping=mapping)
    assert found == {group: group == kept for group in groups.values()}
