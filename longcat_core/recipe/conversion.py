"""Writes an FP8 checkpoint from one in bf16 or fp32, shard by shard; an interrupted run goes on where it was."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.quantization import PUBLISHED_BLOCK, Quantization, published_quantization
from longcat_core.recipe.layers import DRAFT_LAYER, Layer, linear_layers
from longcat_core.weights import checkpoint
from longcat_core.weights.audit import CheckpointError
from longcat_core.weights.blocks import FP8, quantize_blocks, scale_shape
from longcat_core.weights.names import SCALE_SUFFIX
from longcat_core.weights.streaming import Entry, PublishedTensors, divided, write_shard

PROGRESS = "quantize.unfinished.json"
"""Of a run that has not ended: its settings, and what was measured. `config.json` is written last, so that nothing
takes the directory for a checkpoint before."""
_ROWS = PUBLISHED_BLOCK[0]
_SHARD_SIZE = 4 * 2**30
"""Bytes of a shard at most."""
_SHARDS = 3
"""At least: releases are sharded, so a small model is too."""
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".gguf"}


class Source:
    """A checkpoint in bf16 or fp32."""

    def __init__(self, directory: Path) -> None:
        """Read headers only.

        Raises:
            ConfigError, CheckpointError: if it is no LongCat-Flash, does not fit its `config.json`, is in FP8 already,
                or in another precision than bf16 and fp32.
        """
        self.directory = directory
        self.config: LongcatConfig = checkpoint.read_config(directory)
        if self.config.quantization is not None:
            raise CheckpointError(
                f"{directory}: quantised already ({self.config.quantization.method}, by its config.json); give the "
                "checkpoint in bf16 or fp32 that it was made from"
            )
        checkpoint.verify(directory, self.config)
        self.tensors = PublishedTensors(directory, self.config)
        dtypes = {name: self.tensors.dtype(name) for name in self.tensors.shapes}
        for name, dtype in dtypes.items():
            if dtype not in (torch.bfloat16, torch.float32):
                raise CheckpointError(f"{directory}: {name} is {dtype}, wanted BF16 or F32; convert it first")
        self.is_fp32 = all(dtype is torch.float32 for dtype in dtypes.values())
        self.layers = linear_layers(self.config, self.tensors.shapes)

    def dtype_outside_fp8(self, name: str) -> torch.dtype:
        """Of a tensor that stays out of FP8: as it is, but bf16 where the whole checkpoint is in fp32, as releases have
        it and as both engines compute beside FP8. Router and correction bias stay in fp32."""
        found = self.tensors.dtype(name)
        assert isinstance(found, torch.dtype)
        return torch.bfloat16 if self.is_fp32 and ".mlp.router." not in name else found

    def identity(self) -> dict[str, Any]:
        """Names, sizes and times of its files of tensors, and its `config.json`: so a run goes on with those it began
        with."""
        files = {s.name: [s.stat().st_size, s.stat().st_mtime_ns] for s in checkpoint.shards(self.directory)}
        return {"config.json": self.config_json(), "shards": files}

    def config_json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        return found

    def extra_bytes(self, layer: Layer) -> int:
        """What a linear layer takes more out of FP8 than in it."""
        return self.dtype_outside_fp8(layer.weight).itemsize * layer.elements - layer.fp8_bytes

    def other_files(self) -> list[Path]:
        """Tokenizer, chat template, draft gate and so on, by their paths within the directory: all that is neither
        weights, nor `config.json`, nor hidden."""
        left_out = {"config.json", checkpoint.INDEX_NAME, PROGRESS}
        found = []
        for path in sorted(self.directory.rglob("*")):
            inner = path.relative_to(self.directory)
            is_weights = inner.suffix in _OTHER_WEIGHTS or (inner.suffix == ".safetensors" and len(inner.parts) == 1)
            is_hidden = any(part.startswith(".") for part in inner.parts)
            if path.is_file() and not is_hidden and not is_weights and str(inner) not in left_out:
                found.append(inner)
        return found


@dataclass(frozen=True)
class Bytes:
    """Of tensors, before and after."""

    before: int = 0
    after: int = 0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.before + other.before, self.after + other.after)


class Conversion:
    """What a checkpoint in FP8 has in it, and the writing of it."""

    def __init__(self, source: Source, kept: Collection[str], mtp_in_fp8: bool) -> None:
        """kept: groups of linear layers that stay out of FP8; the draft layer by `mtp_in_fp8`."""
        self._source, self._mtp_in_fp8 = source, mtp_in_fp8
        self.ignored = [layer for layer in source.layers if self._is_ignored(layer, kept)]
        """The linear layers that are not in FP8."""
        ignored = {layer.name for layer in self.ignored}
        self._in_fp8 = {layer.weight for layer in source.layers if layer.name not in ignored}
        groups = [self._entries(name) for name in source.tensors.shapes]
        total = sum(entry.nbytes for group in groups for entry in group)
        self._shards = divided(groups, min(_SHARD_SIZE, total // _SHARDS))

    def _is_ignored(self, layer: Layer, kept: Collection[str]) -> bool:
        return not self._mtp_in_fp8 if layer.kind == DRAFT_LAYER else layer.group in kept

    def _entries(self, name: str) -> list[Entry]:
        shape = self._source.tensors.shapes[name]
        if name not in self._in_fp8:
            return [Entry(name, self._source.dtype_outside_fp8(name), shape)]
        scales = Entry(name + SCALE_SUFFIX, torch.float32, scale_shape(shape, PUBLISHED_BLOCK))
        return [Entry(name, FP8, shape), scales]

    def bytes_by_kind(self) -> dict[str, Bytes]:
        """Of tensors, by the kind of a linear layer, and last under "" of all that is never in FP8."""
        kinds = {layer.weight: layer.kind for layer in self._source.layers}
        found: dict[str, Bytes] = dict.fromkeys([*kinds.values(), ""], Bytes())
        for name, shape in self._source.tensors.shapes.items():
            dtype = self._source.tensors.dtype(name)
            assert isinstance(dtype, torch.dtype)
            before = Entry(name, dtype, shape).nbytes
            after = sum(entry.nbytes for entry in self._entries(name))
            kind = kinds.get(name, "")
            found[kind] += Bytes(before, after)
        return found

    def config_json(self) -> dict[str, Any]:
        """The source's, with what it says of precision set."""
        raw = self._source.config_json()
        raw.pop("disable_quant_module", None)
        has_draft_layer_out = any(layer.kind == DRAFT_LAYER for layer in self.ignored)
        quantization = Quantization(
            "fp8",
            ignored=tuple(layer.name for layer in self.ignored),
            disabled=("mtp",) if has_draft_layer_out else (),
        )
        raw |= published_quantization(quantization)
        if self._source.is_fp32:
            raw |= {field: "bfloat16" for field in ("torch_dtype", "dtype") if field in raw}
        return raw

    def cautions(self) -> list[str]:
        """What in this checkpoint is known to be read wrongly by engines' own classes, a sentence each."""
        found = []
        if pairs := sum(layer.name.endswith("q_a_proj") and layer.kind != DRAFT_LAYER for layer in self.ignored):
            found.append(
                f"{pairs} pairs of q_a_proj and kv_a_proj_with_mqa are in bf16: vLLM's own class takes them for FP8 "
                "(fault 9 of docs/upstream.md); the class of this package does not"
            )
        if any(layer.kind == DRAFT_LAYER for layer in self.ignored):
            found.append(
                "the draft layer is in bf16: vLLM's own class takes most of it for FP8 (read in its source), so that "
                "its drafts are bad; --mtp fp8 suits both"
            )
        joined = [layer for layer in self._source.layers if layer.weight in self._in_fp8 and _is_first_of_pair(layer)]
        if uneven := {(layer.name.rsplit(".", 1)[1], layer.shape[0]) for layer in joined if layer.shape[0] % _ROWS}:
            sizes = ", ".join(f"{name} of {rows} rows" for name, rows in sorted(uneven))
            found.append(
                f"{sizes}, no whole blocks of {_ROWS}: an engine that joins it with the projection beside it takes "
                "wrong scales for the rows after (seen in vLLM 0.32); the reference reads it right"
            )
        return found

    def unwritten_bytes(self, out: Path) -> int:
        """Of the shards that `out` does not have yet."""
        return sum(sum(entry.nbytes for entry in entries) for path, entries in self._files(out) if not path.exists())

    def write(self, out: Path, report: Callable[[int], object] = lambda written: None) -> None:
        """Write what `out` does not have yet, `config.json` last, check all of it, and remove `PROGRESS`.

        A shard that is there was written whole by the same run. `report` is called with the bytes of each tensor that
        is written, or was before. In memory is one tensor of the source, with what its FP8 is made of.

        Raises:
            CheckpointError: if a weight has numbers that are not finite, or if what was written is not what
                `config.json` says, as after a failure of the disk.
        """
        index: dict[str, str] = {}
        total = 0
        for path, entries in self._files(out):
            index |= dict.fromkeys((entry.name for entry in entries), path.name)
            size = sum(entry.nbytes for entry in entries)
            total += size
            if path.exists():
                report(size)
            else:
                write_shard(path, entries, self._made(entries, report))
                path.chmod(0o644)
        for name in self._source.other_files():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._source.directory / name, out / name)
        weight_map = dict(sorted(index.items()))
        write_json(out / checkpoint.INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(out / "config.json", self.config_json())
        checkpoint.verify(out, checkpoint.read_config(out))
        (out / PROGRESS).unlink(missing_ok=True)

    def _files(self, out: Path) -> list[tuple[Path, list[Entry]]]:
        count = len(self._shards)
        names = (f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1))
        return [(out / name, entries) for name, entries in zip(names, self._shards, strict=True)]

    def _made(self, entries: Sequence[Entry], report: Callable[[int], object]) -> Iterator[Mapping[str, Tensor]]:
        for entry in entries:
            if entry.name.endswith(SCALE_SUFFIX):
                continue
            tensor = self._source.tensors.read(entry.name)
            if entry.dtype is FP8:
                quantised, scales = quantize_blocks(tensor)
                if not scales.isfinite().all():
                    raise CheckpointError(f"{entry.name}: has numbers that are not finite; download the source again")
                made = {entry.name: quantised, entry.name + SCALE_SUFFIX: scales}
            else:
                made = {entry.name: tensor.to(entry.dtype)}
            del tensor
            yield made
            report(sum(each.nbytes for each in made.values()))


def _is_first_of_pair(layer: Layer) -> bool:
    return layer.name.endswith((".q_a_proj", ".gate_proj"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """The file appears whole or not at all, whatever was there before."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.rename(path)
