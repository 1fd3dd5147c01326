"""Every published spelling of a `config.json`: read, written, and rewritten for transformers and for each engine."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from longcat_core.config import ConfigError, LongcatConfig, RopeConfig
from longcat_core.quantization import published_quantization, quantization_fields, read_quantization

logger = logging.getLogger(__name__)

# The names under which each needed field is published, our own name first.
_NEEDED: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_layers", "num_hidden_layers"),
    "num_attention_heads": ("num_attention_heads",),
    "q_lora_rank": ("q_lora_rank",),
    "kv_lora_rank": ("kv_lora_rank",),
    "qk_nope_head_dim": ("qk_nope_head_dim",),
    "qk_rope_head_dim": ("qk_rope_head_dim",),
    "v_head_dim": ("v_head_dim",),
    "ffn_hidden_size": ("ffn_hidden_size", "intermediate_size"),
    "expert_ffn_hidden_size": ("expert_ffn_hidden_size", "moe_intermediate_size"),
    "n_routed_experts": ("n_routed_experts", "num_local_experts"),
    "moe_topk": ("moe_topk", "num_experts_per_tok"),
    "max_position_embeddings": ("max_position_embeddings",),
}

# Options of the router that have been published, with the values this package implements. `None` means absent.
_ROUTER_OPTIONS: dict[str, tuple[Any, ...]] = {
    "router_bias": (None, False),
    "router_dtype": (None, "float32", "torch.float32"),
    "router_params_dtype": (None, "float32", "torch.float32"),
    "rounter_params_dtype": (None, "float32", "torch.float32"),
    "norm_topk_prob": (None, False),
    "scoring_func": (None, "softmax"),
    "topk_method": (None,),
    "n_group": (None, 1),
    "topk_group": (None, 1),
}

# Options of a router's training (a jitter of its input, weights of its losses), which mean nothing to inference.
_TRAINING_OPTION = re.compile("jitter|loss|aux|dropout|noise")

# Fields outside the router that would change the forward pass.
_FIXED_OPTIONS: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu"),
    "attention_bias": (None, False),
    "attention_method": (None, "MLA"),
    "nextn_use_scmoe": (None, False),
}


# -- read and written -------------------------------------------------------------------------


def read(hf_config: Mapping[str, Any] | Any) -> LongcatConfig:
    """Read a `config.json` mapping, or a transformers configuration object.

    `num_layers` counts decoder layers, each with two attentions. transformers saves `num_hidden_layers` as
    twice that beside it; where only `num_hidden_layers` is given it counts decoder layers.

    Raises:
        ConfigError: with one line for each missing, misshapen or unsupported field.
    """
    raw: Mapping[str, Any] = hf_config.to_dict() if hasattr(hf_config, "to_dict") else hf_config
    if not isinstance(raw, Mapping):
        raise ConfigError(f"config.json: {type(raw).__name__}, wanted an object of fields")
    problems: list[str] = []
    values: dict[str, Any] = {}
    for name, spellings in _NEEDED.items():
        found = {s: raw[s] for s in spellings if raw.get(s) is not None}
        if not found:
            problems.append(f"{' or '.join(spellings)}: missing; give a positive integer")
            continue
        spelling, value = next(iter(found.items()))
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(f"{spelling}: {value!r}, wanted a positive integer")
            continue
        values[name] = value
        disagreeing = {s: v for s, v in found.items() if v not in _accepted_twins(name, value)}
        for other, theirs in disagreeing.items():
            problems.append(f"{other}: {theirs!r} contradicts {spelling}: {value!r}; remove one")
    problems += _check_options(raw)
    zero_expert_num = raw.get("zero_expert_num") or 0
    zero_expert_type = raw.get("zero_expert_type")
    if not isinstance(zero_expert_num, int) or isinstance(zero_expert_num, bool) or zero_expert_num < 0:
        problems.append(f"zero_expert_num: {zero_expert_num!r}, wanted an integer of at least 0")
    elif zero_expert_num and zero_expert_type not in (None, "identity"):
        problems.append(f"zero_expert_type: {zero_expert_type!r}, wanted 'identity', the only one published")
    scaling = _number(raw, "routed_scaling_factor", problems)
    eps = _number(raw, "rms_norm_eps", problems, default=1e-5)
    quantization = read_quantization(raw, problems)
    scales_q, scales_kv = (_boolean(raw, f"mla_scale_{part}_lora", problems, True) for part in ("q", "kv"))
    ties = _boolean(raw, "tie_word_embeddings", problems, False)
    rope = _read_rope(raw, problems)
    if not problems:
        problems += _check_sizes(values, zero_expert_num)
    if problems:
        raise ConfigError("not a LongCat-Flash configuration that can be served:\n  " + "\n  ".join(problems))
    assert rope is not None
    return LongcatConfig(
        **values,
        rope=rope,
        zero_expert_num=zero_expert_num,
        routed_scaling_factor=scaling,
        rms_norm_eps=eps,
        mla_scale_q_lora=scales_q,
        mla_scale_kv_lora=scales_kv,
        tie_word_embeddings=ties,
        quantization=quantization,
    )


def published(config: LongcatConfig) -> dict[str, Any]:
    """The fields of a `config.json` as LongCat-Flash-Chat is published; `read` reads them back unchanged."""
    rope = rope_parameters(config.rope)
    theta = rope.pop("rope_theta")
    scaling = {"rope_scaling": rope} if config.rope.is_yarn else {}
    sizes = {name: getattr(config, name) for name in _NEEDED}
    return {
        "architectures": ["LongcatFlashForCausalLM"],
        "attention_bias": False,
        **sizes,
        "rope_theta": theta,
        **scaling,
        "hidden_act": "silu",
        "mla_scale_kv_lora": config.mla_scale_kv_lora,
        "mla_scale_q_lora": config.mla_scale_q_lora,
        "rms_norm_eps": config.rms_norm_eps,
        "rounter_params_dtype": "float32",
        "routed_scaling_factor": config.routed_scaling_factor,
        "router_bias": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "zero_expert_num": config.zero_expert_num,
        "zero_expert_type": "identity",
        **(published_quantization(config.quantization) if config.quantization is not None else {}),
    }


def for_transformers(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration in the one spelling that transformers 5 reads without loss.

    transformers' class halves `num_hidden_layers` and takes defaults of the 560 B model for what is missing, so
    its reading of a file that has only `num_hidden_layers` is a model of half the depth.

    Raises:
        ConfigError: as `read`.
    """
    config = read(raw)
    dropped = {spelling for spellings in _NEEDED.values() for spelling in spellings}
    dropped |= {"head_dim", "qk_head_dim", "rope_theta", "rope_scaling", _LENGTHENED}
    kept = {key: value for key, value in raw.items() if key not in dropped}
    sizes = {name: getattr(config, name) for name in _NEEDED}
    return {
        **kept,
        **sizes,
        "head_dim": config.qk_rope_head_dim,  # transformers takes the rotary dimension from it
        "rope_parameters": rope_parameters(config.rope),
        "zero_expert_num": config.zero_expert_num,
        "rms_norm_eps": config.rms_norm_eps,
        "model_type": "longcat_flash",
        # Without defaults in vLLM's own class.
        "zero_expert_type": "identity",
        "mla_scale_q_lora": config.mla_scale_q_lora,
        "mla_scale_kv_lora": config.mla_scale_kv_lora,
    }


def for_sglang(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration as SGLang's own class reads it, in which `num_hidden_layers` counts decoder layers.

    Raises:
        ConfigError: as `read`.
    """
    config = read(raw)
    dropped = {"num_hidden_layers", "intermediate_size", "moe_intermediate_size", "rope_parameters", "head_dim"}
    dropped |= {_LENGTHENED}
    kept = {key: value for key, value in raw.items() if key not in dropped}
    renamed = {"rope_scaling": None, "model_type": "longcat_flash", "num_experts_per_tok": config.moe_topk}
    return {**kept, **published(config), **renamed, **quantization_fields(raw)}


def field_of(spelling: str) -> str:
    """Our name of the field that is published under this one; any other name as it is."""
    return next((field for field, spellings in _NEEDED.items() if spelling in spellings), spelling)


def is_read(name: str) -> bool:
    """Whether a field of this name in a `config.json` says something of the model."""
    return (
        field_of(name) in {field.name for field in fields(LongcatConfig)}
        or name in _ROUTER_OPTIONS
        or name in _FIXED_OPTIONS
        or name in (*_ROPE, "zero_expert_type", "quantization_config")
    )


def _accepted_twins(name: str, value: int) -> tuple[int, ...]:
    return (value, 2 * value) if name == "num_layers" else (value,)


def _check_options(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, accepted in {**_ROUTER_OPTIONS, **_FIXED_OPTIONS}.items():
        if raw.get(key) not in accepted:
            wanted = " or ".join(repr(v) for v in accepted if v is not None) or "no such option"
            problems.append(f"{key}: {raw[key]!r}, wanted {wanted}")
    unknown = [key for key in raw if key.startswith(("router_", "rounter_")) and key not in _ROUTER_OPTIONS]
    of_training = [key for key in unknown if _TRAINING_OPTION.search(key)]
    if of_training:
        _warn_of_ignored(f"a router's training: {', '.join(of_training)}")
    for key in unknown:
        if key not in of_training:
            problems.append(f"{key}: {raw[key]!r} is an unknown router option; known are {', '.join(_ROUTER_OPTIONS)}")
    return problems


@cache
def _warn_of_ignored(options: str) -> None:
    """Once, as a configuration is read in many places."""
    logger.warning("LongCat-Flash does not read these options of %s", options)


def _check_sizes(values: Mapping[str, int], zero_expert_num: int) -> list[str]:
    problems = []
    if values["moe_topk"] > values["n_routed_experts"] + zero_expert_num:
        total = values["n_routed_experts"] + zero_expert_num
        problems.append(f"moe_topk: {values['moe_topk']}, wanted at most the {total} experts there are")
    if values["qk_rope_head_dim"] % 2:
        problems.append(f"qk_rope_head_dim: {values['qk_rope_head_dim']}, wanted an even number")
    return problems


def _boolean(raw: Mapping[str, Any], name: str, problems: list[str], default: bool) -> bool:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        problems.append(f"{name}: {value!r}, wanted true or false")
    return bool(value)


# -- the rotary embedding ---------------------------------------------------------------------


_LENGTHENED = "original_max_position_embeddings"
_YARN = {field.name for field in fields(RopeConfig)} - {"theta"}


def _read_rope(raw: Mapping[str, Any], problems: list[str]) -> RopeConfig | None:
    """`rope_theta` with `rope_scaling` (published) or `rope_parameters` (transformers 5); transformers reads the length
    from which YaRN lengthens a context beside them as well."""
    found: dict[str, Any] = {"rope_theta": raw.get("rope_theta")}
    for name in ("rope_scaling", "rope_parameters"):
        given = raw.get(name) or {}
        if not isinstance(given, Mapping):
            problems.append(f"{name}: {given!r}, wanted an object")
            return None
        found |= given
    known = len(problems)
    beside = raw.get(_LENGTHENED)
    if beside is not None and found.get(_LENGTHENED) not in (None, beside):
        problems.append(
            f"{_LENGTHENED}: {found[_LENGTHENED]!r} contradicts {beside!r} outside of rope_scaling; remove one"
        )
    found[_LENGTHENED] = beside if beside is not None else found.get(_LENGTHENED)
    theta = _number(found, "rope_theta", problems)
    kind = found.get("rope_type") or found.get("type")
    of_yarn = sorted(found.keys() & _YARN - {_LENGTHENED})
    if kind is None and of_yarn:
        problems.append(f"rope_scaling: {of_yarn[0]} without a rope_type; give 'yarn', or remove it")
    if unread := sorted(found.keys() - _YARN - {"rope_theta", "rope_type", "type"}):
        _warn_of_ignored(f"the rotary embedding: {', '.join(unread)}")
    kind = kind or "default"
    if kind == "default":
        return RopeConfig(theta=theta) if len(problems) == known else None
    if kind not in ("yarn", "deepseek_yarn"):
        problems.append(f"rope_type: {kind!r}, wanted 'default' or 'yarn'")
        return None
    rope = RopeConfig(
        theta=theta,
        factor=1.0 if found.get("factor") == 1 else _number(found, "factor", problems, above=1.0),
        original_max_position_embeddings=int(_number(found, _LENGTHENED, problems, default=0.0)),
        beta_fast=_number(found, "beta_fast", problems, default=32.0),
        beta_slow=_number(found, "beta_slow", problems, default=1.0),
        mscale=_number(found, "mscale", problems, default=0.0, above=-1.0),
        mscale_all_dim=_number(found, "mscale_all_dim", problems, default=0.0, above=-1.0),
        attention_factor=None
        if found.get("attention_factor") is None
        else _number(found, "attention_factor", problems),
        truncate=_boolean(found, "truncate", problems, True),
    )
    if len(problems) > known:
        return None
    return rope if rope.is_yarn else RopeConfig(theta=theta)


def rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    """As transformers 5 has it in a field of that name."""
    if not rope.is_yarn:
        return {"rope_theta": rope.theta, "rope_type": "default"}
    # What was not given is 0 here. vLLM's and SGLang's class for DeepSeek would take it for an mscale of 0, and for the
    # length of a context that is not to be lengthened.
    given = {name: value for name, value in vars(rope).items() if value}
    settings = {name: value for name, value in given.items() if name != "theta"} | {"truncate": rope.truncate}
    return {"rope_theta": rope.theta, "rope_type": "yarn", **settings}


def _number(
    raw: Mapping[str, Any], name: str, problems: list[str], *, default: float | None = None, above: float = 0.0
) -> float:
    """A number above `above`, or the default where the field is absent; else a problem is noted."""
    value = raw.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < math.inf:
        problems.append(f"{name}: {value!r}, wanted a number above {above:g}")
        return 0.0
    return float(value)


# -- fields that an engine overrides after it has read a file -----------------------------------

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", _LENGTHENED)


def overridden(canonical: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields to set in a configuration spelt as `for_transformers` has it, for these overrides.

    A name means what it means in a `config.json`: `num_hidden_layers` counts decoder layers, `rope_scaling` leaves
    `rope_theta` as it is. Sizes are not checked, as one may only fit another that is overridden later.

    Raises:
        ConfigError: for a rotary embedding that cannot be served, or two spellings of one field that differ.
    """
    fields: dict[str, Any] = {}
    for name, value in overrides.items():
        field = field_of(name)
        if field == "num_layers" and name != field and "num_layers" in overrides:
            if value not in (overrides["num_layers"], 2 * overrides["num_layers"]):
                raise ConfigError(f"{name}: {value!r} contradicts num_layers: {overrides['num_layers']!r}; remove one")
        elif fields.get(field, value) != value:
            raise ConfigError(f"{name}: {value!r} contradicts {field}: {fields[field]!r}; remove one")
        elif name not in _ROPE:
            fields[field] = value
    if overrides.keys() & set(_ROPE):
        fields["rope_parameters"] = _rope({**canonical, **fields}, overrides)
    rope_dim = fields.get("qk_rope_head_dim")
    return fields if rope_dim is None else {**fields, "head_dim": rope_dim}


def _rope(canonical: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(canonical["rope_parameters"])
    if "rope_theta" in overrides:
        rope["rope_theta"] = overrides["rope_theta"]
    for name in ("rope_scaling", "rope_parameters"):
        if name in overrides:
            given = overrides[name] or {"rope_type": "default"}
            if not isinstance(given, Mapping):
                raise ConfigError(f"{name}: {given!r}, wanted an object")
            # Without a type it is a change of what there is.
            kept = {"rope_theta": rope["rope_theta"]} if {"rope_type", "type"} & given.keys() else rope
            rope = {**kept, **given}
            if rope.get("rope_type") == "default" and (more := sorted(given.keys() & _YARN)):
                raise ConfigError(f"{name}: {more[0]} without a rope_type; give 'yarn', or remove it")
    if _LENGTHENED in overrides:
        rope[_LENGTHENED] = overrides[_LENGTHENED]
    problems: list[str] = []
    rope_read = _read_rope(
        {"rope_parameters": rope, "max_position_embeddings": canonical.get("max_position_embeddings")}, problems
    )
    if rope_read is None:
        raise ConfigError("not a rotary embedding that can be served:\n  " + "\n  ".join(problems))
    return rope_parameters(rope_read)
