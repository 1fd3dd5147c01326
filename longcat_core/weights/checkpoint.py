"""Files of a checkpoint: `config.json` and safetensors, read, written and checked."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longcat_core import spellings
from longcat_core.config import ConfigError, LongcatConfig
from longcat_core.quantization import PUBLISHED_BLOCK
from longcat_core.weights.audit import Audit, CheckpointError, unstacked
from longcat_core.weights.blocks import dequantize_blocks
from longcat_core.weights.names import SCALE_SUFFIX, all_tensors, expert_parts, is_mtp, stacked_experts

INDEX_NAME = "model.safetensors.index.json"
AUXILIARY_NAME = "model-auxiliary.safetensors"
"""Where releases of the family have the MTP layer beside the shards."""
_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


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
    return spellings.read(raw)


def verify(directory: Path, config: LongcatConfig, requires_mtp: bool = False) -> None:
    """Check every shard's header against the configuration, and FP8 scales, but no weights. With `requires_mtp` the MTP
    layer has to be there.

    Raises:
        CheckpointError: if the directory has no safetensors, a shard is missing or truncated, or tensors are
            missing, extra or misshapen; all problems are listed.
    """
    audit = Audit(all_tensors(config), config)
    for shard in shards(directory):
        with OpenShard(shard) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                piece = tensors.get_slice(name)
                accepted = audit.accepts(name, tuple(piece.get_shape()), _DTYPES.get(piece.get_dtype()))
                if accepted and name.endswith(SCALE_SUFFIX):
                    audit.check_scales(name, piece[:])
    audit.raise_for_all(requires_mtp)
    audit.warn_of_ignored()


def load(directory: Path, config: LongcatConfig) -> dict[str, Tensor]:
    """Read all tensors, by published name, after the checks of `verify`. FP8 weights come in fp32, with their scales.

    Raises:
        CheckpointError: as `verify`, and for a quantisation that cannot be read.
    """
    if config.quantization is not None and (problems := config.quantization.problems()):
        raise CheckpointError(f"{directory}: {'; '.join(problems)}; give a checkpoint in bf16, fp32 or such FP8")
    verify(directory, config)
    expected = all_tensors(config)
    tensors: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for shard in shards(directory):
        with OpenShard(shard) as opened:
            for name in opened.keys():  # noqa: SIM118
                if name.endswith(SCALE_SUFFIX):
                    scales[name.removesuffix(SCALE_SUFFIX)] = opened.get_tensor(name)
                elif stacked_experts(name):
                    parts = unstacked(name, opened.get_tensor(name), config)
                    tensors |= zip(expert_parts(name, config), parts, strict=True)
                elif name in expected:
                    tensors[name] = opened.get_tensor(name)
    block = config.quantization.block if config.quantization is not None else PUBLISHED_BLOCK
    return tensors | {name: dequantize_blocks(tensors[name], each, block=block) for name, each in scales.items()}


def mtp_weights_in_fp8(directory: Path) -> frozenset[str]:
    """The weights of the MTP layer that have scales, by the index or, without one, by the headers of all shards.

    Raises:
        CheckpointError: as `shards`, and for a file that is not safetensors.
    """
    index = directory / INDEX_NAME
    names: set[str] = set()
    if index.exists():
        shards(directory)  # which checks the index
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    else:
        for shard in shards(directory):
            with OpenShard(shard) as tensors:
                names.update(tensors.keys())
    return frozenset(name.removesuffix(SCALE_SUFFIX) for name in names if is_mtp(name) and name.endswith(SCALE_SUFFIX))


def save(tensors: Mapping[str, Tensor], directory: Path, max_shard_size: int = 2**30) -> None:
    """Write published tensors as sharded safetensors with an index. `max_shard_size` is in bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_torch_state_dict(copies, directory, max_shard_size=max_shard_size, metadata={"format": "pt"})
    for shard in shards(directory):
        shard.chmod(0o644)  # safetensors makes files that only their owner can read


def shards(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names and the auxiliary one, or all there are.

    Raises:
        CheckpointError: if there are none, or the index names files that do not exist.
    """
    index = directory / INDEX_NAME
    if index.exists():
        try:
            named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: not a safetensors index ({error!r}); download it again") from None
        absent = [name for name in named if not (directory / name).exists()]
        if absent:
            raise CheckpointError(f"{index} names shards that do not exist: {', '.join(absent)}; download them again")
        return [directory / name for name in named] + unnamed(directory, named)
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{directory}: no *.safetensors; LongCat-Flash is loaded from safetensors only")
    return found


def unnamed(directory: Path, named: Collection[str]) -> list[Path]:
    """The auxiliary file, if there is one and the index does not name it."""
    auxiliary = directory / AUXILIARY_NAME
    return [auxiliary] if auxiliary.exists() and AUXILIARY_NAME not in named else []


def unnamed_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """What engines leave out, as they read the files that the index names: the tensors of the auxiliary file, where
    there is an index and it does not name that file."""
    if not (directory / INDEX_NAME).exists():
        return
    named = json.loads((directory / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"].values()
    for shard in unnamed(directory, named):
        with OpenShard(shard) as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


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
