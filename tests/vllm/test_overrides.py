"""`--hf-overrides` changes the model that is served, in every spelling of `config.json`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longcat_core import spellings
from longcat_core.config import RopeConfig
from tests.cases import CASES
from tests.engines.test_bad_checkpoints import refusal
from tests.vllm.engine import configure, speculation

CONFIG = CASES["default"].config
YARN = RopeConfig(theta=1e7, factor=4.0, original_max_position_embeddings=128)
SCALING = {"factor": 4.0, "original_max_position_embeddings": 128}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(spellings.published(CONFIG)))
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "change"),
    [
        ({"rope_theta": 5e6}, {"rope": RopeConfig(theta=5e6)}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}, {"rope": RopeConfig(theta=5e6)}),
        ({"rope_scaling": {"rope_type": "yarn", **SCALING}}, {"rope": YARN}),
        ({"rope_scaling": {"type": "deepseek_yarn", **SCALING}}, {"rope": YARN}),
        ({"rope_parameters": {"rope_type": "yarn", **SCALING}}, {"rope": YARN}),
        ({"rope_scaling": {"rope_type": "yarn", **SCALING}, "rope_theta": 5e6}, {"rope": replace(YARN, theta=5e6)}),
        ({"rope_scaling": None}, {}),
        ({"max_position_embeddings": 2048}, {"max_position_embeddings": 2048}),
        ({"num_layers": 1}, {"num_layers": 1}),
        ({"num_hidden_layers": 1}, {"num_layers": 1}),
        ({"num_layers": 1, "num_hidden_layers": 2}, {"num_layers": 1}),
        ({"num_hidden_layers": 2, "num_layers": 1}, {"num_layers": 1}),
        ({"routed_scaling_factor": 2.5}, {"routed_scaling_factor": 2.5}),
        ({"moe_topk": 3}, {"moe_topk": 3}),
        ({"num_experts_per_tok": 3}, {"moe_topk": 3}),
        ({"moe_topk": 14, "n_routed_experts": 16}, {"moe_topk": 14, "n_routed_experts": 16}),
        ({"num_local_experts": 4}, {"n_routed_experts": 4}),
        ({"intermediate_size": 32, "moe_intermediate_size": 16}, {"ffn_hidden_size": 32, "expert_ffn_hidden_size": 16}),
        ({"zero_expert_num": 0}, {"zero_expert_num": 0}),
        ({"rms_norm_eps": 1e-3, "mla_scale_q_lora": False}, {"rms_norm_eps": 1e-3, "mla_scale_q_lora": False}),
        ({"qk_rope_head_dim": 4, "num_attention_heads": 2}, {"qk_rope_head_dim": 4, "num_attention_heads": 2}),
    ],
    ids=str,
)
def test_an_override_means_what_it_means_in_the_file(
    overrides: dict[str, Any], change: dict[str, Any], good: Path
) -> None:
    assert configure(good, hf_overrides=overrides, load_format="dummy") == replace(CONFIG, **change)


def shrunk(hf_config: Any) -> Any:
    """As vLLM's own tests make a model small."""
    hf_config.num_hidden_layers = 1
    hf_config.update({"rope_theta": 5e6})
    return hf_config


def test_a_function_overrides_as_well(good: Path) -> None:
    wanted = replace(CONFIG, num_layers=1, rope=RopeConfig(theta=5e6))
    assert configure(good, hf_overrides=shrunk, load_format="dummy") == wanted


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type: 'linear', wanted 'default' or 'yarn'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor: None, wanted a number above 1"),
        ({"rope_theta": -1.0}, "rope_theta: -1.0, wanted a number above 0"),
        ({"moe_topk": 3, "num_experts_per_tok": 4}, "num_experts_per_tok: 4 contradicts moe_topk: 3"),
        ({"num_layers": 1, "num_hidden_layers": 3}, "num_hidden_layers: 3 contradicts num_layers: 1"),
        ({"moe_topk": 13}, "moe_topk: 13, wanted at most the 12 experts there are"),
        ({"router_bias": True}, "router_bias: True, wanted False"),
        ({"zero_expert_type": "drop"}, "zero_expert_type: 'drop', wanted 'identity'"),
        ({"text_config": {"rope_theta": 5e6}}, "text_config"),
    ],
    ids=str,
)
def test_an_override_that_cannot_be_served_is_refused_by_name(
    overrides: dict[str, Any], wanted: str, good: Path
) -> None:
    assert wanted in refusal(good, hf_overrides=overrides, load_format="dummy")


def test_an_override_that_nothing_reads_is_named(good: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("vllm").addHandler(caplog.handler)  # whose records do not reach the root
    configure(good, hf_overrides={"rope_thetta": 5e6, "head_dim": 4, "eos_token_id": 7}, load_format="dummy")
    logging.getLogger("vllm").removeHandler(caplog.handler)
    assert "LongCat-Flash reads no field head_dim or rope_thetta;" in caplog.text


def test_drafts_reach_the_end_of_a_context_that_is_overridden(good: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        str(good),
        skip_tokenizer_init=True,
        load_format="dummy",
        hf_overrides={"max_position_embeddings": 2048},
        **speculation(2),
    ).create_engine_config()
    assert config.speculative_config.draft_model_config.max_model_len == config.model_config.max_model_len == 2048
