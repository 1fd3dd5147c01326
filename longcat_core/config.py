"""Every published spelling of a LongCat-Flash `config.json` into one dataclass, and the numbers derived from it."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from longcat_core.rope import RopeConfig as RopeConfig
from longcat_core.rope import number, read_rope, rope_to_hf, yarn_mscale

logger = logging.getLogger(__name__)


class ConfigError(ValueError):
    """A configuration that is not a LongCat-Flash model this package can run; the message lists every problem."""


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


@dataclass(frozen=True)
class LongcatConfig:
    """One LongCat-Flash model. Sizes are elements; names follow the published `config.json`.

    Source: technical report (arXiv 2509.01322) and the published repositories.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    ffn_hidden_size: int
    expert_ffn_hidden_size: int
    n_routed_experts: int
    moe_topk: int
    max_position_embeddings: int
    rope: RopeConfig
    zero_expert_num: int = 0
    routed_scaling_factor: float = 1.0
    rms_norm_eps: float = 1e-5
    # transformers builds the norms inside MLA with their default epsilon, not with `rms_norm_eps`.
    mla_norm_eps: float = 1e-6
    mla_scale_q_lora: bool = True
    mla_scale_kv_lora: bool = True
    tie_word_embeddings: bool = False
    is_quantized: bool = False
    disable_quant_module: tuple[str, ...] = ()

    # -- shapes and factors of the forward pass --------------------------------------------------

    @property
    def num_experts(self) -> int:
        """FFN and zero experts together: the router's width."""
        return self.n_routed_experts + self.zero_expert_num

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached for one token and one attention: the normed latent and the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def q_scale(self) -> float:
        """Factor on the whole query (nope and rope parts)."""
        return math.sqrt(self.hidden_size / self.q_lora_rank) if self.mla_scale_q_lora else 1.0

    @property
    def kv_scale(self) -> float:
        """Factor on the normed latent, so on the keys' nope part and on the values; the rope key has none."""
        return math.sqrt(self.hidden_size / self.kv_lora_rank) if self.mla_scale_kv_lora else 1.0

    @property
    def softmax_scale(self) -> float:
        scale = self.qk_head_dim**-0.5
        if self.rope.is_yarn and self.rope.mscale_all_dim:
            scale *= yarn_mscale(self.rope.factor, self.rope.mscale_all_dim) ** 2
        return scale

    # -- derived numbers -------------------------------------------------------------------------

    @property
    def attention_parameters(self) -> int:
        """Parameters of one MLA block."""
        heads, rank = self.num_attention_heads, self.q_lora_rank
        query = self.hidden_size * rank + rank + rank * heads * self.qk_head_dim
        latent = self.hidden_size * self.latent_dim + self.kv_lora_rank
        expand = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        return query + latent + expand + heads * self.v_head_dim * self.hidden_size

    @property
    def expert_parameters(self) -> int:
        """Parameters of one FFN expert (37.75 M for LongCat-Flash-Chat)."""
        return 3 * self.hidden_size * self.expert_ffn_hidden_size

    @property
    def _dense_layer_parameters(self) -> int:
        dense_ffn = 3 * self.hidden_size * self.ffn_hidden_size
        router = self.num_experts * (self.hidden_size + 1)
        return 2 * (self.attention_parameters + dense_ffn + 2 * self.hidden_size) + router

    @property
    def total_parameters(self) -> int:
        """All parameters of the main model, without the MTP layer."""
        layer = self._dense_layer_parameters + self.n_routed_experts * self.expert_parameters
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    def activated_parameters(self, ffn_experts: float) -> float:
        """Parameters that one token multiplies with, when `ffn_experts` of its slots a layer are FFN experts.

        The embedding is a lookup and does not count; the output head does.
        """
        layer = self._dense_layer_parameters + ffn_experts * self.expert_parameters
        return self.num_layers * layer + self.vocab_size * self.hidden_size

    def kv_cache_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of cache for one token: two attentions a layer."""
        return self.num_layers * 2 * self.latent_dim * itemsize

    # -- reading ---------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any] | Any) -> LongcatConfig:
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
        scaling = number(raw, "routed_scaling_factor", problems)
        eps = number(raw, "rms_norm_eps", problems, default=1e-5)
        unquantized = raw.get("disable_quant_module") or ()
        if not isinstance(unquantized, (list, tuple)) or not all(isinstance(kind, str) for kind in unquantized):
            problems.append(f"disable_quant_module: {unquantized!r}, wanted a list of module kinds")
            unquantized = ()
        scales_q, scales_kv = (_boolean(raw, f"mla_scale_{part}_lora", problems, True) for part in ("q", "kv"))
        ties = _boolean(raw, "tie_word_embeddings", problems, False)
        rope = read_rope(raw, problems)
        if not problems:
            problems += _check_sizes(values, zero_expert_num)
        if problems:
            raise ConfigError("not a LongCat-Flash configuration that can be served:\n  " + "\n  ".join(problems))
        assert rope is not None
        return cls(
            **values,
            rope=rope,
            zero_expert_num=zero_expert_num,
            routed_scaling_factor=scaling,
            rms_norm_eps=eps,
            mla_scale_q_lora=scales_q,
            mla_scale_kv_lora=scales_kv,
            tie_word_embeddings=ties,
            is_quantized=bool(raw.get("quantization_config")),
            disable_quant_module=tuple(unquantized),
        )

    def to_hf(self) -> dict[str, Any]:
        """The fields of a `config.json` as LongCat-Flash-Chat is published; `from_hf` reads it back unchanged."""
        rope: dict[str, Any] = {"rope_theta": self.rope.theta}
        if self.rope.is_yarn:
            rope["rope_scaling"] = rope_to_hf(self.rope)
        sizes = {name: getattr(self, name) for name in _NEEDED}
        return {
            "architectures": ["LongcatFlashForCausalLM"],
            "attention_bias": False,
            **sizes,
            **rope,
            "hidden_act": "silu",
            "mla_scale_kv_lora": self.mla_scale_kv_lora,
            "mla_scale_q_lora": self.mla_scale_q_lora,
            "rms_norm_eps": self.rms_norm_eps,
            "rounter_params_dtype": "float32",
            "routed_scaling_factor": self.routed_scaling_factor,
            "router_bias": False,
            "tie_word_embeddings": self.tie_word_embeddings,
            "zero_expert_num": self.zero_expert_num,
            "zero_expert_type": "identity",
            **({"disable_quant_module": list(self.disable_quant_module)} if self.disable_quant_module else {}),
        }


def canonical_hf(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration in the one spelling that transformers 5 reads without loss.

    transformers' class halves `num_hidden_layers` and takes defaults of the 560 B model for what is missing, so
    its reading of a file that has only `num_hidden_layers` is a model of half the depth.

    Raises:
        ConfigError: as `LongcatConfig.from_hf`.
    """
    config = LongcatConfig.from_hf(raw)
    dropped = {spelling for spellings in _NEEDED.values() for spelling in spellings}
    dropped |= {"head_dim", "qk_head_dim", "rope_theta", "rope_scaling"}
    kept = {key: value for key, value in raw.items() if key not in dropped}
    sizes = {name: getattr(config, name) for name in _NEEDED}
    return {
        **kept,
        **sizes,
        "head_dim": config.qk_rope_head_dim,  # transformers takes the rotary dimension from it
        "rope_parameters": {"rope_theta": config.rope.theta, **rope_to_hf(config.rope)},
        "zero_expert_num": config.zero_expert_num,
        "rms_norm_eps": config.rms_norm_eps,
        "model_type": "longcat_flash",
        # Without defaults in vLLM's own class.
        "zero_expert_type": "identity",
        "mla_scale_q_lora": config.mla_scale_q_lora,
        "mla_scale_kv_lora": config.mla_scale_kv_lora,
    }


def field_of(spelling: str) -> str:
    """Our name of the field that is published under this one; any other name as it is."""
    return next((field for field, spellings in _NEEDED.items() if spelling in spellings), spelling)


def is_read(name: str) -> bool:
    """Whether a field of this name in a `config.json` says something of the model."""
    return (
        field_of(name) in {field.name for field in fields(LongcatConfig)}
        or name in _ROUTER_OPTIONS
        or name in _FIXED_OPTIONS
        or name in ("rope_theta", "rope_scaling", "rope_parameters", "zero_expert_type", "quantization_config")
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
        _warn_of_ignored(", ".join(of_training))
    for key in unknown:
        if key not in of_training:
            problems.append(f"{key}: {raw[key]!r} is an unknown router option; known are {', '.join(_ROUTER_OPTIONS)}")
    return problems


@cache
def _warn_of_ignored(options: str) -> None:
    """Once, as a configuration is read in many places."""
    logger.warning("LongCat-Flash does not read these options of a router's training: %s", options)


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
