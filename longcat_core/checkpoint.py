"""Published checkpoints: which tensors there are, where each goes, reading, writing and saying what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longcat_core.config import ConfigError, LongcatConfig

MTP_PREFIX = "model.mtp."
INDEX_NAME = "model.safetensors.index.json"
SCALE_SUFFIX = "_scale_inv"
SCALE_BLOCK = 128
"""FP8 releases scale weights by blocks of 128 x 128 (report, section 5)."""

_EXPERT = re.compile(r"(?P<moe>.*\.mlp\.experts)\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight(_scale_inv)?")
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


class CheckpointError(ValueError):
    """A checkpoint that does not belong to its configuration; the message lists every problem."""


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


def folded(name: str, tensor: Tensor, config: LongcatConfig) -> Tensor:
    """The tensor an engine loads: the norms inside the main model's and the MTP layer's MLA take the MLA scales into
    their weights, once, so that the forward pass has none; everything else is as published."""
    if name.endswith(".q_a_layernorm.weight"):
        return (tensor.float() * config.q_scale).to(tensor.dtype)
    if name.endswith(".kv_a_layernorm.weight"):
        return (tensor.float() * config.kv_scale).to(tensor.dtype)
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


class Audit:
    """Compares the tensors of a checkpoint, as they come by, with those that the configuration calls for."""

    def __init__(self, config: LongcatConfig) -> None:
        self._expected = expected_tensors(config, with_mtp=True)
        # transformers also saves a tied head, which is the embedding, and rows for zero experts, which are never read.
        zero_experts = range(config.n_routed_experts, config.num_experts)
        self._redundant = {
            f"model.layers.{n}.mlp.experts.{e}.{part}_proj.weight"
            for n in range(config.num_layers)
            for e in zero_experts
            for part in ("gate", "up")
        }
        if config.tie_word_embeddings:
            self._redundant.add("lm_head.weight")
        self._is_quantized = config.is_quantized
        self._seen: dict[str, torch.dtype | None] = {}
        self._problems: list[str] = []

    def accepts(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> bool:
        """Note one tensor; False if it is not to be loaded, for a reason that is kept for the end."""
        weight = name.removesuffix(SCALE_SUFFIX)
        self._seen[name] = dtype
        if name in self._redundant:
            return False
        if weight not in self._expected:
            self._problems.append(f"extra: {name} {list(shape)}; remove it, or check config.json")
            return False
        wanted = self._expected[weight]
        if name != weight:
            wanted = tuple(-(-size // SCALE_BLOCK) for size in wanted)
        if shape != wanted:
            self._problems.append(f"misshapen: {name} is {list(shape)}, wanted {list(wanted)}")
            return False
        return True

    def raise_for_unexpected(self) -> None:
        """Raise CheckpointError, listing every extra and misshapen tensor so far, if there are any."""
        self._raise(self._problems)

    def raise_for_all(self, requires_mtp: bool = False) -> None:
        """Raise CheckpointError if, all having come by, tensors were extra, misshapen or missing; all are listed.

        The MTP layer is there as a whole or not at all; `requires_mtp`: it has to be there.
        """
        has_mtp = any(name.startswith(MTP_PREFIX) for name in self._seen)
        if requires_mtp and not has_mtp:
            raise CheckpointError(
                f"the checkpoint has no MTP layer (no tensor is called {MTP_PREFIX}*), which speculation drafts with; "
                "serve it without speculation, or give a checkpoint that has one"
            )
        missing = [
            f"missing: {name} {list(shape)}"
            for name, shape in self._expected.items()
            if name not in self._seen and (has_mtp or not name.startswith(MTP_PREFIX))
        ]
        in_fp8 = [name for name, dtype in self._seen.items() if dtype in _FP8]
        unscaled = [
            f"missing: {name}{SCALE_SUFFIX}, the scales of an FP8 weight; convert the checkpoint with its scales"
            for name in in_fp8
            if name + SCALE_SUFFIX not in self._seen
        ]
        undeclared = (
            [f"missing: quantization_config in config.json, while {len(in_fp8)} tensors are FP8, {in_fp8[0]} the first"]
            if in_fp8 and not unscaled and not self._is_quantized
            else []
        )
        self._raise(self._problems + missing + unscaled + undeclared)

    @staticmethod
    def _raise(problems: list[str]) -> None:
        if problems:
            listed = "\n  ".join(problems)
            raise CheckpointError(
                f"the checkpoint does not match its config.json ({len(problems)} problems):\n  {listed}"
            )


def audited(
    weights: Iterable[tuple[str, Tensor]], config: LongcatConfig, *, is_partial: bool, requires_mtp: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are to be loaded, one at a time.

    is_partial: none is missed, as in an update of a running model; requires_mtp: see `Audit.raise_for_all`.

    Raises:
        CheckpointError: after the last one, listing every tensor that was extra, misshapen, or missing.
    """
    audit = Audit(config)
    for name, tensor in weights:
        if audit.accepts(name, tuple(tensor.shape), tensor.dtype):
            yield name, tensor
    if is_partial:
        audit.raise_for_unexpected()
    else:
        audit.raise_for_all(requires_mtp)


def verify(directory: Path, config: LongcatConfig, requires_mtp: bool = False) -> None:
    """Check every shard's header against the configuration, without reading weights. `requires_mtp`: for drafting.

    Raises:
        CheckpointError: if the directory has no safetensors, a shard is missing or truncated, or tensors are
            missing, extra or misshapen; all problems are listed.
    """
    audit = Audit(config)
    for shard in shards(directory):
        with OpenShard(shard) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                piece = tensors.get_slice(name)
                audit.accepts(name, tuple(piece.get_shape()), _DTYPES.get(piece.get_dtype()))
    audit.raise_for_all(requires_mtp)


def load(directory: Path, config: LongcatConfig) -> dict[str, Tensor]:
    """Read all tensors, by published name, after the checks of `verify`.

    Raises:
        CheckpointError: as `verify`, and for FP8 weights.
    """
    verify(directory, config)
    expected = expected_tensors(config, with_mtp=True)
    tensors: dict[str, Tensor] = {}
    for shard in shards(directory):
        with OpenShard(shard) as opened:
            for name in opened.keys():  # noqa: SIM118
                if name.endswith(SCALE_SUFFIX):
                    raise CheckpointError(f"{shard}: {name} scales FP8 weights; wanted float32 or bfloat16 weights")
                if name in expected:
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
