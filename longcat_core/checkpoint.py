"""Published checkpoints: which tensors there are, where each goes, reading, writing and saying what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longcat_core.audit import MTP_PREFIX as MTP_PREFIX
from longcat_core.audit import SCALE_SUFFIX as SCALE_SUFFIX
from longcat_core.audit import Audit, expert_parts, stacked_experts
from longcat_core.audit import CheckpointError as CheckpointError
from longcat_core.config import ConfigError, LongcatConfig

INDEX_NAME = "model.safetensors.index.json"
_EXPERT = re.compile(r"(?P<moe>.*\.mlp\.experts)\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight(_scale_inv)?")
_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


class Place(NamedTuple):
    """Where a published tensor goes: a parameter of `reference.LongcatForCausalLM` and a part of it."""

    parameter: str
    part: int | slice | tuple[int, slice]


def place(name: str, config: LongcatConfig) -> Place:
    """Experts are stacked, the gate's rows above the up projection's; everything else keeps its name."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return Place(name, slice(None))
    inner, expert = config.expert_ffn_hidden_size, int(match["expert"])
    parts: dict[str, Place] = {
        "gate": Place(f"{match['moe']}.w13", (expert, slice(0, inner))),
        "up": Place(f"{match['moe']}.w13", (expert, slice(inner, 2 * inner))),
        "down": Place(f"{match['moe']}.w2", expert),
    }
    return parts[match["part"]]


def expert_of(name: str) -> int | None:
    """The FFN expert that a published tensor belongs to, or None."""
    match = _EXPERT.fullmatch(name)
    return int(match["expert"]) if match else None


def packed_parameter(name: str, fused_qkv_a: str) -> tuple[str, int | None]:
    """The parameter that a published tensor goes to where projections of one input are packed, as engines do it, and
    which part of it it is, or None: the gate lies above the up projection in `gate_up_proj`, and the query's low rank
    above the latent in what the engine calls `fused_qkv_a`."""
    packed = {"q_a_proj": (fused_qkv_a, 0), "kv_a_proj_with_mqa": (fused_qkv_a, 1)}
    packed |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
    module, part, suffix = name.rsplit(".", 2) if name.count(".") > 1 else ("", name, "")
    if part not in packed:
        return name, None
    target, index = packed[part]
    return f"{module}.{target}.{suffix}", index


def expert_parameter(name: str) -> tuple[str, str]:
    """The parameter of all experts that a published tensor of one goes to, `....mlp.experts.w13_weight` or `w2_weight`,
    and the name that engines have for its part: w1 (gate), w2 (down), w3 (up)."""
    module, _, part, suffix = name.rsplit(".", 3)
    stacked, shard = {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}[part]
    return f"{module}.{stacked}_{suffix}", shard


def mtp_parameter(name: str) -> str | None:
    """The parameter that a published tensor goes to where the MTP layer is a model of its own; None for the model's."""
    return f"model.{name.removeprefix(MTP_PREFIX)}" if name.startswith(MTP_PREFIX) else None


def expected_tensors(config: LongcatConfig, with_mtp: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a published checkpoint, without FP8 scales."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for n in range(config.num_layers):
        layer = f"model.layers.{n}"
        for i in range(2):
            shapes[f"{layer}.input_layernorm.{i}.weight"] = (hidden,)
            shapes[f"{layer}.post_attention_layernorm.{i}.weight"] = (hidden,)
            shapes |= _attention(f"{layer}.self_attn.{i}", config)
            shapes |= _ffn(f"{layer}.mlps.{i}", hidden, config.ffn_hidden_size)
        shapes[f"{layer}.mlp.router.classifier.weight"] = (config.num_experts, hidden)
        shapes[f"{layer}.mlp.router.e_score_correction_bias"] = (config.num_experts,)
        for e in range(config.n_routed_experts):
            shapes |= _ffn(f"{layer}.mlp.experts.{e}", hidden, config.expert_ffn_hidden_size)
    return shapes | (_mtp(config) if with_mtp else {})


@cache
def _all_tensors(config: LongcatConfig) -> Mapping[str, tuple[int, ...]]:
    return MappingProxyType(expected_tensors(config, with_mtp=True))


def folded(name: str, tensor: Tensor, config: LongcatConfig) -> Tensor:
    """The tensor an engine loads: the norms inside the main model's and the MTP layer's MLA take the MLA scales into
    their weights, once, so that the forward pass has none; everything else is as published.

    A scaled weight is fp32, so that it is rounded only once: to the dtype that is served, when it is loaded."""
    if name.endswith(".q_a_layernorm.weight"):
        return tensor.float() * config.q_scale
    if name.endswith(".kv_a_layernorm.weight"):
        return tensor.float() * config.kv_scale
    return tensor


def read_config(directory: Path) -> LongcatConfig:
    """Read `config.json`.

    Raises:
        ConfigError: if the file is missing, is not JSON, or is not a LongCat-Flash configuration.
    """
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the directory of a checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    return LongcatConfig.from_hf(raw)


def audited(
    weights: Iterable[tuple[str, Tensor]], config: LongcatConfig, *, is_partial: bool
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are to be loaded, one at a time, by their published names: stacked experts come one by one.

    is_partial: none is missed, as in an update of a running model.

    Raises:
        CheckpointError: listing every tensor that is extra, misshapen, or missing: after the last one, or, for an
            update whose tensors are there already (not read while they are iterated over), at once.
    """
    return _audited(weights, _all_tensors(config), config, is_partial)


def audited_mtp(
    weights: Iterable[tuple[str, Tensor]], config: LongcatConfig, *, is_partial: bool
) -> Iterator[tuple[str, Tensor]]:
    """As `audited`, where the MTP layer is a model of its own: the model's tensors are passed over without a look, and
    the layer has to be there."""
    mine: Iterable[tuple[str, Tensor]] = (each for each in weights if each[0].startswith(MTP_PREFIX))
    if isinstance(weights, Collection):
        mine = list(mine)
    return _audited(mine, _mtp(config), config, is_partial, requires_mtp=True)


def _audited(
    weights: Iterable[tuple[str, Tensor]],
    expected: Mapping[str, tuple[int, ...]],
    config: LongcatConfig,
    is_partial: bool,
    requires_mtp: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    if is_partial and isinstance(weights, Collection):
        audit = Audit(expected, config)
        for name, tensor in weights:
            audit.accepts(name, tuple(tensor.shape), tensor.dtype)
        audit.raise_for_unexpected()
    return _accepted(weights, Audit(expected, config), config, is_partial, requires_mtp)


def _accepted(
    weights: Iterable[tuple[str, Tensor]], audit: Audit, config: LongcatConfig, is_partial: bool, requires_mtp: bool
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        if not audit.accepts(name, tuple(tensor.shape), tensor.dtype):
            continue
        if stacked_experts(name):
            yield from zip(expert_parts(name, config), _unstacked(name, tensor, config), strict=True)
        else:
            yield name, tensor
    if is_partial:
        audit.raise_for_unexpected()
    else:
        audit.raise_for_all(requires_mtp)
    audit.warn_of_ignored()


def _unstacked(name: str, tensor: Tensor, config: LongcatConfig) -> Iterator[Tensor]:
    """What `expert_parts` names, in its order."""
    for expert in tensor[: config.n_routed_experts]:
        yield from expert.chunk(2) if name.endswith("gate_up_proj") else (expert,)


def verify(directory: Path, config: LongcatConfig, requires_mtp: bool = False) -> None:
    """Check every shard's header against the configuration, without reading weights. `requires_mtp`: for drafting.

    Raises:
        CheckpointError: if the directory has no safetensors, a shard is missing or truncated, or tensors are
            missing, extra or misshapen; all problems are listed.
    """
    audit = Audit(_all_tensors(config), config)
    for shard in shards(directory):
        with OpenShard(shard) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                piece = tensors.get_slice(name)
                audit.accepts(name, tuple(piece.get_shape()), _DTYPES.get(piece.get_dtype()))
    audit.raise_for_all(requires_mtp)
    audit.warn_of_ignored()


def load(directory: Path, config: LongcatConfig) -> dict[str, Tensor]:
    """Read all tensors, by published name, after the checks of `verify`.

    Raises:
        CheckpointError: as `verify`, and for FP8 weights.
    """
    verify(directory, config)
    expected = _all_tensors(config)
    tensors: dict[str, Tensor] = {}
    for shard in shards(directory):
        with OpenShard(shard) as opened:
            for name in opened.keys():  # noqa: SIM118
                if name.endswith(SCALE_SUFFIX):
                    raise CheckpointError(f"{shard}: {name} scales FP8 weights; wanted float32 or bfloat16 weights")
                if stacked_experts(name):
                    parts = _unstacked(name, opened.get_tensor(name), config)
                    tensors |= zip(expert_parts(name, config), parts, strict=True)
                elif name in expected:
                    tensors[name] = opened.get_tensor(name)
    return tensors


def save(tensors: Mapping[str, Tensor], directory: Path, max_shard_size: int = 2**30) -> None:
    """Write published tensors as sharded safetensors with an index. `max_shard_size` is in bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_torch_state_dict(copies, directory, max_shard_size=max_shard_size, metadata={"format": "pt"})
    for shard in shards(directory):
        shard.chmod(0o644)  # safetensors makes files that only their owner can read


def shards(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or all there are.

    Raises:
        CheckpointError: if there are none, or the index names files that are not there.
    """
    index = directory / INDEX_NAME
    if index.exists():
        try:
            named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: not a safetensors index ({error!r}); download it again") from None
        absent = [name for name in named if not (directory / name).exists()]
        if absent:
            raise CheckpointError(f"{index} names shards that are not there: {', '.join(absent)}; download them again")
        return [directory / name for name in named]
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{directory}: no *.safetensors; LongCat-Flash is loaded from safetensors only")
    return found


class OpenShard:
    """`safe_open`, whose errors name the file."""

    def __init__(self, shard: Path) -> None:
        self._shard = shard

    def __enter__(self) -> safe_open:
        try:
            self._opened = safe_open(self._shard, framework="pt")
            return self._opened.__enter__()
        except SafetensorError as error:
            size = self._shard.stat().st_size
            raise CheckpointError(
                f"{self._shard}: truncated or not safetensors at {size} bytes ({error}); download it again"
            ) from None
        except OSError as error:  # a link to nowhere, a directory, a file of another user
            raise CheckpointError(
                f"{self._shard}: cannot be read ({error}); make it readable, or download it again"
            ) from None

    def __exit__(self, *error: object) -> None:
        self._opened.__exit__(*error)


def _attention(prefix: str, config: LongcatConfig) -> dict[str, tuple[int, ...]]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    return {
        f"{prefix}.q_a_proj.weight": (config.q_lora_rank, hidden),
        f"{prefix}.q_a_layernorm.weight": (config.q_lora_rank,),
        f"{prefix}.q_b_proj.weight": (heads * config.qk_head_dim, config.q_lora_rank),
        f"{prefix}.kv_a_proj_with_mqa.weight": (config.latent_dim, hidden),
        f"{prefix}.kv_a_layernorm.weight": (config.kv_lora_rank,),
        f"{prefix}.kv_b_proj.weight": (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        f"{prefix}.o_proj.weight": (hidden, heads * config.v_head_dim),
    }


def _ffn(prefix: str, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (intermediate, hidden),
        f"{prefix}.up_proj.weight": (intermediate, hidden),
        f"{prefix}.down_proj.weight": (hidden, intermediate),
    }


def _mtp(config: LongcatConfig) -> dict[str, tuple[int, ...]]:
    hidden, layer = config.hidden_size, f"{MTP_PREFIX}layers.0"
    return {
        f"{MTP_PREFIX}embed_tokens.weight": (config.vocab_size, hidden),
        f"{MTP_PREFIX}norm.weight": (hidden,),
        f"{layer}.eh_proj.weight": (hidden, 2 * hidden),
        f"{layer}.enorm.m.weight": (hidden,),
        f"{layer}.hnorm.m.weight": (hidden,),
        f"{layer}.input_layernorm.weight": (hidden,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
        **_attention(f"{layer}.self_attn", config),
        **_ffn(f"{layer}.transformer_layer.mlp", hidden, config.ffn_hidden_size),
    }
