"""`--json-model-override-args` means what the same fields mean in a `config.json`, in every published spelling."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longcat_core.config import ConfigError, LongcatConfig
from tests.cases import CASES, Case
from tests.plugin import save_llama
from tests.sglang.engine import _resolved, configure

CASE = CASES["default"]
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


def overridden(directory: Path, **fields: Any) -> LongcatConfig:
    longcat = configure(directory, json_model_override_args=json.dumps(fields), load_format="dummy")
    assert longcat is not None
    return longcat


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"num_layers": 1}, "num_layers", 1),
        ({"num_hidden_layers": 1}, "num_layers", 1),
        ({"num_layers": 1, "num_hidden_layers": 2}, "num_layers", 1),
        ({"max_position_embeddings": 128}, "max_position_embeddings", 128),
        ({"routed_scaling_factor": 1.5}, "routed_scaling_factor", 1.5),
        ({"num_experts_per_tok": 1}, "moe_topk", 1),
        ({"intermediate_size": 32}, "ffn_hidden_size", 32),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps", 1e-3),
        ({"rope_theta": 5e6}, "rope.theta", 5e6),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}, "rope.theta", 5e6),
        ({"rope_scaling": {"rope_type": "yarn", **YARN}}, "rope.factor", 4.0),
        ({"rope_scaling": {"type": "deepseek_yarn", **YARN}}, "rope.original_max_position_embeddings", 64),
        ({"rope_parameters": {"rope_type": "yarn", **YARN}}, "rope.factor", 4.0),
    ],
    ids=str,
)
def test_an_overridden_field_is_what_the_model_is_built_from(
    fields: dict[str, Any], name: str, value: Any, checkpoint_of: Callable[[Case], Path]
) -> None:
    found: Any = overridden(checkpoint_of(CASE), **fields)
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value


def test_what_is_not_overridden_stays(checkpoint_of: Callable[[Case], Path]) -> None:
    published = configure(checkpoint_of(CASE))
    assert published is not None
    longcat = overridden(checkpoint_of(CASE), rope_scaling={"rope_type": "yarn", **YARN})
    assert longcat.rope.theta == published.rope.theta
    assert longcat.num_layers == published.num_layers
    assert overridden(checkpoint_of(CASE), rope_scaling=None) == published
    assert configure(checkpoint_of(CASE)) == published, "not even the next time"


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type: 'longrope', wanted 'default' or 'yarn'"),
        ({"num_layers": "many"}, "num_layers: 'many', wanted a positive integer"),
        ({"moe_topk": 1000}, "moe_topk: 1000, wanted at most the"),
        ({"num_layers": 1, "num_hidden_layers": 3}, "num_hidden_layers: 3 contradicts num_layers: 1"),
    ],
    ids=str,
)
def test_an_override_that_cannot_be_served_is_named(
    fields: dict[str, Any], wanted: str, checkpoint_of: Callable[[Case], Path]
) -> None:
    with pytest.raises(ConfigError) as refused:
        overridden(checkpoint_of(CASE), **fields)
    assert wanted in str(refused.value)


def test_another_models_overrides_are_sglangs_own(tmp_path: Path) -> None:
    from sglang.srt.utils.hf_transformers_utils import get_config

    config = get_config(str(save_llama(tmp_path)), False, model_override_args={"num_hidden_layers": 1, "unknown": 2})
    assert (config.num_hidden_layers, config.unknown) == (1, 2)


def test_sglang_still_overrides_a_configuration_that_has_been_read() -> None:
    """If this fails, the hook "overridden configuration" may have become unnecessary."""
    import inspect

    from sglang.srt.utils.hf_transformers import config

    source = inspect.getsource(inspect.unwrap(config.get_config))
    assert source.index("parser.parse(") < source.index("setattr(config, key, value)")


@pytest.mark.parametrize(("scaling", "context"), [({"factor": 4.0}, 2048), (YARN, 512), ({}, 512)])
def test_yarn_lengthens_the_context_as_sglang_has_it(
    scaling: dict[str, Any], context: int, checkpoint_of: Callable[[Case], Path]
) -> None:
    """By its factor, unless it says which context it was made for."""
    from sglang.srt.arg_groups.overrides import model_config_of

    override = json.dumps({"rope_scaling": {"rope_type": "yarn", **scaling} if scaling else None})
    assert (
        model_config_of(_resolved(checkpoint_of(CASE), {"json_model_override_args": override})).context_len == context
    )


def test_what_only_sglang_reads_of_a_quantisation_stays() -> None:
    from longcat_core import spellings
    from longcat_sglang.config import LongcatFlashConfig

    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    raw = {**spellings.published(CASE.config), "quantization_config": {**quantization, "scale_fmt": "ue8m0"}}
    config = LongcatFlashConfig.from_dict(raw)
    assert config.quantization_config == raw["quantization_config"]
    overridden = config.overridden({"moe_topk": 1})
    assert overridden.longcat.moe_topk == 1
    assert overridden.quantization_config == raw["quantization_config"]
