"""The load plan: every published tensor has one place of its own in an engine's model."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from longcat_core.config import LongcatConfig
from longcat_core.weights.names import SCALE_SUFFIX, expected_tensors, mtp_tensors
from longcat_core.weights.plan import Layout, Target, load_plan, mtp_load_plan
from tests.cases import CASES, DEFAULT

LAYOUT = Layout(fused_qkv_a="fused", experts="experts.stacked")
CONFIGS = [case.config for case in CASES.values()]


@pytest.mark.parametrize("config", CONFIGS, ids=list(CASES))
def test_every_tensor_has_one_place(config: LongcatConfig) -> None:
    for plan, tensors in (
        (load_plan(config, LAYOUT), expected_tensors(config, with_mtp=False)),
        (mtp_load_plan(config, LAYOUT), mtp_tensors(config)),
    ):
        assert {name for name in plan if not name.endswith(SCALE_SUFFIX)} == tensors.keys()
        places = [target[:4] for target in plan.values()]
        assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("model.norm.weight", Target("model.norm.weight")),
        ("lm_head.weight", Target("lm_head.weight")),
        (
            "model.layers.0.mlp.router.e_score_correction_bias",
            Target("model.layers.0.mlp.router.e_score_correction_bias"),
        ),
        ("model.layers.1.self_attn.0.q_a_proj.weight", Target("model.layers.1.self_attn.0.fused.weight", part=0)),
        (
            "model.layers.1.self_attn.0.kv_a_proj_with_mqa.weight_scale_inv",
            Target("model.layers.1.self_attn.0.fused.weight_scale_inv", part=1),
        ),
        ("model.layers.0.mlps.1.gate_proj.weight", Target("model.layers.0.mlps.1.gate_up_proj.weight", part=0)),
        ("model.layers.0.mlps.1.up_proj.weight", Target("model.layers.0.mlps.1.gate_up_proj.weight", part=1)),
        ("model.layers.0.mlps.1.down_proj.weight", Target("model.layers.0.mlps.1.down_proj.weight")),
        (
            "model.layers.0.mlp.experts.3.gate_proj.weight",
            Target("model.layers.0.mlp.experts.stacked.w13_weight", expert=3, shard="w1"),
        ),
        (
            "model.layers.0.mlp.experts.3.up_proj.weight_scale_inv",
            Target("model.layers.0.mlp.experts.stacked.w13_weight_scale_inv", expert=3, shard="w3"),
        ),
        (
            "model.layers.0.mlp.experts.2.down_proj.weight",
            Target("model.layers.0.mlp.experts.stacked.w2_weight", expert=2, shard="w2"),
        ),
    ],
)
def test_where_a_tensor_goes(name: str, target: Target) -> None:
    assert load_plan(DEFAULT, LAYOUT)[name] == target


def test_the_mtp_layer_is_a_model_of_its_own() -> None:
    plan = mtp_load_plan(DEFAULT, LAYOUT)
    assert plan["model.mtp.embed_tokens.weight"] == Target("model.embed_tokens.weight")
    attention, layer = "model.mtp.layers.0.self_attn", "model.layers.0"
    assert plan[f"{attention}.kv_a_proj_with_mqa.weight"] == Target(f"{layer}.self_attn.fused.weight", part=1)
    up = "model.mtp.layers.0.transformer_layer.mlp.up_proj.weight"
    assert plan[up] == Target(f"{layer}.transformer_layer.mlp.gate_up_proj.weight", part=1)


@pytest.mark.parametrize("part", ["q_a", "kv_a"])
def test_a_scaled_norm_is_rounded_once_to_the_dtype_that_is_served(part: str) -> None:
    scale = DEFAULT.q_scale if part == "q_a" else DEFAULT.kv_scale
    assert scale != 1.0
    weight = torch.randn(32, generator=torch.Generator().manual_seed(0)).bfloat16()
    for plan, layer in (
        (load_plan(DEFAULT, LAYOUT), "model.layers.0.self_attn.0"),
        (mtp_load_plan(DEFAULT, LAYOUT), "model.mtp.layers.0.self_attn"),
    ):
        assert plan[f"{layer}.{part}_layernorm.weight"].folded(weight).equal(weight.float() * scale)
    norm = load_plan(DEFAULT, LAYOUT)["model.norm.weight"]
    assert norm.folded(weight).equal(weight)
    assert norm.folded(weight).dtype == torch.bfloat16
