"""Reading every published spelling of `config.json`, saying what is wrong with it, and the derived numbers."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LongcatFlashConfig

from longcat_core import spellings
from longcat_core.config import ConfigError, LongcatConfig, RopeConfig
from longcat_core.layers import rotary
from longcat_core.quantization import Quantization
from longcat_core.weights import checkpoint, names
from tests.cases import CASES, CHAT, DEFAULT, every_spelling

RAW = spellings.published(DEFAULT)
EVERY_SPELLING = [(case, spelling) for case in CASES for spelling in every_spelling(CASES[case].config)]


@pytest.mark.parametrize(("case", "spelling"), EVERY_SPELLING)
def test_every_spelling_is_the_same_model(case: str, spelling: str) -> None:
    config = CASES[case].config
    assert spellings.read(every_spelling(config)[spelling]) == config


@pytest.mark.parametrize(("case", "spelling"), EVERY_SPELLING)
def test_every_spelling_is_canonical_to_transformers(case: str, spelling: str) -> None:
    config = CASES[case].config
    theirs = LongcatFlashConfig.from_dict(spellings.for_transformers(every_spelling(config)[spelling]))
    same = ["num_layers", "hidden_size", "moe_topk", "n_routed_experts", "zero_expert_num", "ffn_hidden_size"]
    same += ["expert_ffn_hidden_size", "rms_norm_eps", "qk_head_dim", "tie_word_embeddings", "routed_scaling_factor"]
    assert {name: getattr(theirs, name) for name in same} == {name: getattr(config, name) for name in same}
    assert theirs.head_dim == config.qk_rope_head_dim
    assert theirs.rope_parameters["rope_theta"] == config.rope.theta
    assert theirs.rope_parameters.get("factor", 1.0) == config.rope.factor


@pytest.mark.parametrize("case", CASES)
def test_a_config_saved_by_transformers_is_the_same_model(case: str, tmp_path: Any) -> None:
    config = CASES[case].config
    theirs = LongcatFlashConfig.from_dict(spellings.for_transformers(spellings.published(config)))
    assert spellings.read(theirs) == config
    theirs.save_pretrained(tmp_path)
    assert spellings.read(json.loads((tmp_path / "config.json").read_text())) == config
    assert checkpoint.read_config(tmp_path) == config


rope_configs = st.builds(RopeConfig, theta=st.floats(1e2, 1e8)) | st.builds(
    RopeConfig,
    theta=st.floats(1e2, 1e8),
    factor=st.floats(1.5, 64),
    original_max_position_embeddings=st.integers(16, 2**17),
    beta_fast=st.floats(8, 64),
    beta_slow=st.floats(0.5, 4),
    mscale=st.floats(0, 2),
    mscale_all_dim=st.floats(0, 2),
    attention_factor=st.none() | st.floats(0.5, 2),
    truncate=st.booleans(),
)
quantizations = st.builds(
    Quantization,
    method=st.just("fp8"),
    fmt=st.sampled_from(["e4m3", "e5m2"]),
    activation_scheme=st.sampled_from(["dynamic", "static"]),
    block=st.tuples(st.integers(1, 256), st.integers(1, 256)),
    ignored=st.sampled_from([(), ("model.layers.0.mlps.0.down_proj", "model.layers.1.self_attn")]),
    disabled=st.sampled_from([(), ("self_attn",), ("self_attn", "mlps", "mtp")]),
)
sizes = st.integers(1, 4096)
configs = st.builds(
    LongcatConfig,
    **dict.fromkeys(("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "v_head_dim"), sizes),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "ffn_hidden_size"), sizes),
    **dict.fromkeys(("expert_ffn_hidden_size", "max_position_embeddings"), sizes),
    qk_rope_head_dim=sizes.map(lambda half: 2 * half),
    n_routed_experts=st.integers(16, 512),
    moe_topk=st.integers(1, 16),
    zero_expert_num=st.integers(0, 256),
    rope=rope_configs,
    routed_scaling_factor=st.floats(0.1, 10),
    rms_norm_eps=st.floats(1e-8, 1e-2),
    mla_scale_q_lora=st.booleans(),
    mla_scale_kv_lora=st.booleans(),
    tie_word_embeddings=st.booleans(),
    quantization=st.none() | quantizations,
)


@given(configs)
def test_to_hf_is_read_back_unchanged(config: LongcatConfig) -> None:
    assert spellings.read(json.loads(json.dumps(spellings.published(config)))) == config


# -- derived numbers ---------------------------------------------------------------------------------


def test_longcat_flash_chat_has_its_published_numbers() -> None:
    chat = spellings.read(CHAT)
    assert chat.total_parameters / 1e9 == pytest.approx(560, abs=2)
    assert chat.activated_parameters(0) / 1e9 == pytest.approx(18.6, abs=0.1)
    assert chat.activated_parameters(12) / 1e9 == pytest.approx(31.3, abs=0.1)
    assert chat.expert_parameters / 1e6 == pytest.approx(37.75, abs=0.01)
    assert chat.kv_cache_bytes_per_token() == 64_512
    assert chat.q_scale == pytest.approx(2.0)
    assert chat.kv_scale == pytest.approx(math.sqrt(12))
    assert chat.softmax_scale == pytest.approx(192**-0.5)
    assert (chat.num_experts, chat.latent_dim) == (768, 576)


@pytest.mark.parametrize("case", CASES)
def test_total_parameters_are_those_of_the_published_tensors(case: str) -> None:
    config = CASES[case].config
    shapes = names.expected_tensors(config, with_mtp=False).values()
    assert config.total_parameters == sum(math.prod(shape) for shape in shapes)


def test_an_mla_scale_turned_off_is_one() -> None:
    config = spellings.read({**CHAT, "mla_scale_q_lora": False, "mla_scale_kv_lora": False})
    assert (config.q_scale, config.kv_scale) == (1.0, 1.0)


def test_yarn_scales_the_softmax_only_with_mscale_all_dim() -> None:
    plain = 24**-0.5
    assert CASES["default"].config.softmax_scale == pytest.approx(plain)
    assert CASES["yarn"].config.softmax_scale == pytest.approx(plain)
    mscale = 0.1 * 0.8 * math.log(4) + 1
    assert CASES["yarn_mscale_all_dim"].config.softmax_scale == pytest.approx(plain * mscale**2)


# -- errors ------------------------------------------------------------------------------------------

NEEDED = [
    *("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "ffn_hidden_size", "expert_ffn_hidden_size"),
    *("n_routed_experts", "moe_topk", "max_position_embeddings", "routed_scaling_factor", "rope_theta"),
]


@pytest.mark.parametrize("field", NEEDED)
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(ConfigError, match=field) as error:
        spellings.read({key: value for key, value in RAW.items() if key != field})
    assert len(str(error.value).splitlines()) == 2, "one heading and one problem"


def test_all_missing_fields_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        spellings.read({})
    problems = str(error.value).splitlines()[1:]
    assert len(problems) == len(NEEDED)
    assert all(any(field in problem for problem in problems) for field in NEEDED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: 0, wanted a positive integer"),
        ({"hidden_size": "64"}, "hidden_size: '64', wanted a positive integer"),
        ({"num_layers": True}, "num_layers: True, wanted a positive integer"),
        ({"num_layers": 2.0}, "num_layers: 2.0, wanted a positive integer"),
        ({"zero_expert_num": -1}, "zero_expert_num: -1"),
        ({"zero_expert_type": "copy"}, "zero_expert_type: 'copy', wanted 'identity'"),
        ({"zero_expert_type": "drop"}, "zero_expert_type: 'drop', wanted 'identity'"),
        ({"routed_scaling_factor": "6"}, "routed_scaling_factor: '6'"),
        ({"router_scale": 0.1}, "router_scale: 0.1 is an unknown router option"),
        ({"rounter_groups": 1}, "rounter_groups: 1 is an unknown router option"),
        ({"router_bias": True}, "router_bias: True, wanted False"),
        ({"router_dtype": "bfloat16"}, "router_dtype: 'bfloat16', wanted 'float32'"),
        ({"rounter_params_dtype": "bfloat16"}, "rounter_params_dtype: 'bfloat16'"),
        ({"norm_topk_prob": True}, "norm_topk_prob: True, wanted False"),
        ({"scoring_func": "sigmoid"}, "scoring_func: 'sigmoid', wanted 'softmax'"),
        ({"topk_method": "noaux_tc"}, "topk_method: 'noaux_tc', wanted no such option"),
        ({"n_group": 8}, "n_group: 8, wanted 1"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu', wanted 'silu'"),
        ({"attention_bias": True}, "attention_bias: True, wanted False"),
        ({"intermediate_size": 97}, "intermediate_size: 97 contradicts ffn_hidden_size: 96"),
        ({"moe_intermediate_size": 31}, "moe_intermediate_size: 31 contradicts expert_ffn_hidden_size: 32"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok: 5 contradicts moe_topk: 4"),
        ({"num_hidden_layers": 3}, "num_hidden_layers: 3 contradicts num_layers: 2"),
        ({"moe_topk": 13}, "moe_topk: 13, wanted at most the 12 experts"),
        ({"moe_topk": 9, "zero_expert_num": 0}, "moe_topk: 9, wanted at most the 8 experts"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: 7, wanted an even number"),
        ({"rope_theta": None}, "rope_theta: None, wanted a number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_type: 'llama3', wanted 'default' or 'yarn'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor: None, wanted a number above 1"),
    ],
)
def test_an_error_names_the_field_the_value_and_what_is_wanted(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        spellings.read({**RAW, **change})
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 2, "one heading and one problem"


def test_zero_expert_type_does_not_matter_without_zero_experts() -> None:
    config = spellings.read({**RAW, "zero_expert_num": 0, "zero_expert_type": "copy"})
    assert config == replace(DEFAULT, zero_expert_num=0)


def test_problems_of_different_kinds_are_listed_at_once() -> None:
    change = {"hidden_size": -1, "zero_expert_type": "copy", "router_bias": True, "intermediate_size": 5}
    with pytest.raises(ConfigError) as error:
        spellings.read({**RAW, **change, "rope_theta": None})
    problems = str(error.value).splitlines()[1:]
    assert len(problems) == 5
    assert all(any(field in problem for problem in problems) for field in [*change, "rope_theta"])


def test_an_unreadable_config_file_is_named(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not JSON"):
        checkpoint.read_config(tmp_path)


@pytest.mark.parametrize("wrong", ["x", [1], float("nan")], ids=repr)
@pytest.mark.parametrize("field", sorted(CHAT.keys() - {"architectures"}))
def test_a_value_of_the_wrong_kind_is_an_error_that_names_the_field(field: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        spellings.read(CHAT | {field: wrong})


@pytest.mark.parametrize("wrong", ["x", [1], 5], ids=repr)
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters", "disable_quant_module"])
def test_a_value_that_should_be_a_collection_is_an_error_that_names_the_field(field: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        spellings.read(CHAT | {field: wrong})


@pytest.mark.parametrize("content", [[], "x", None, 3])
def test_a_config_that_is_no_object_is_refused(content: Any) -> None:
    with pytest.raises(ConfigError, match="wanted an object"):
        spellings.read(content)


def test_options_of_a_routers_training_are_ignored_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    raw = {**CHAT, "router_jitter_noise": 0.01, "router_aux_loss_coef": 0.001, "router_z_loss": 0.1}
    for _ in range(2):
        assert spellings.read(raw) == spellings.read(CHAT)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.endswith("router_jitter_noise, router_aux_loss_coef, router_z_loss")


@pytest.mark.parametrize("kind", [{"type": "yarn"}, {"rope_type": "yarn"}, {"rope_type": "deepseek_yarn"}], ids=str)
@pytest.mark.parametrize("factor", [1, 1.0])
def test_yarn_of_factor_1_is_plain_rope(kind: dict[str, str], factor: float) -> None:
    scaling = {**kind, "factor": factor, "original_max_position_embeddings": 4096, "mscale": 1.0}
    config = spellings.read({**spellings.published(DEFAULT), "rope_scaling": scaling})
    assert config == DEFAULT


def test_yarn_of_factor_1_keeps_a_factor_on_cos_and_sin_that_is_given() -> None:
    scaling = {"rope_type": "yarn", "factor": 1.0, "attention_factor": 1.3}
    config = spellings.read({**spellings.published(DEFAULT), "rope_scaling": scaling})
    assert rotary.attention_factor(config.rope) == 1.3
    assert spellings.read(spellings.published(config)) == config


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_yarn_without_its_name_is_not_taken_for_plain_rope(name: str) -> None:
    with pytest.raises(ConfigError, match="factor without a rope_type; give 'yarn', or remove it"):
        spellings.read({**spellings.published(DEFAULT), name: {"factor": 4.0, "rope_theta": 1e4}})


def test_a_setting_of_the_rotary_embedding_that_is_not_read_is_named(caplog: pytest.LogCaptureFixture) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "attn_factor": 2.0, "extrapolation_factor": 1}
    assert spellings.read({**spellings.published(DEFAULT), "rope_scaling": scaling}).rope.factor == 4.0
    assert "does not read these options of the rotary embedding: attn_factor, extrapolation_factor" in caplog.text


def test_an_override_that_names_no_type_changes_the_rotary_embedding_there_is() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "original_max_position_embeddings": 128}
    canonical = spellings.for_transformers({**spellings.published(DEFAULT), "rope_scaling": yarn})
    for name in ("rope_scaling", "rope_parameters"):
        found = spellings.overridden(canonical, {name: {"factor": 8.0}})["rope_parameters"]
        assert (found["rope_type"], found["factor"], found["beta_fast"]) == ("yarn", 8.0, 16.0)
        with pytest.raises(ConfigError, match="factor without a rope_type"):
            spellings.overridden(spellings.for_transformers(spellings.published(DEFAULT)), {name: {"factor": 8.0}})


def test_an_mscale_that_is_not_given_is_not_handed_on() -> None:
    """vLLM's and SGLang's class for DeepSeek would take a 0 for an mscale of 0, so no factor on cos and sin."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    config = spellings.read({**spellings.published(DEFAULT), "rope_scaling": yarn})
    assert not {"mscale", "mscale_all_dim"} & spellings.published(config)["rope_scaling"].keys()
