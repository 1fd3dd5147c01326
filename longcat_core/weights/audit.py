"""Compares the tensors of a checkpoint, one by one as they are read, with those that its configuration requires."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.quantization import PUBLISHED_BLOCK
from longcat_core.weights.blocks import FP8, scale_shape
from longcat_core.weights.embeddings import compared
from longcat_core.weights.names import (
    MTP_PREFIX,
    SCALE_SUFFIX,
    all_tensors,
    expert_parts,
    is_mtp,
    mtp_tensors,
    stacked_experts,
)

logger = logging.getLogger(__name__)

_FP8 = (FP8, torch.float8_e5m2)
_HARMLESS = re.compile(
    r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)"  # follow from the configuration
    r"|.*\.self_attn(\.\d)?(\.\w+)?\.(q|k|v|kv|kv_cache|prob|output)_scale"  # of an FP8 cache, which are not used
    r"|model\.mtp\.(layers\.\d+\.)?(lm_head|shared_head\.head)\.weight"  # the drafter uses the model's
)
"""Tensors that other software leaves in a checkpoint and no LongCat-Flash reads."""


class CheckpointError(ValueError):
    """A checkpoint that does not match its configuration; the message lists every problem."""


class Audit:
    """One pass over a checkpoint's tensors. `expected`: name and shape of every tensor that may be there."""

    def __init__(self, expected: Mapping[str, tuple[int, ...]], config: LongcatConfig) -> None:
        self._expected, self._config = expected, config
        self._block = config.quantization.block if config.quantization is not None else PUBLISHED_BLOCK
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
        self._seen: dict[str, torch.dtype | None] = {}
        self._ignored: list[str] = []
        self._problems: list[str] = []

    def accepts(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> bool:
        """Record one tensor; False if it is not to be loaded, for a reason that is reported at the end."""
        if stacked_experts(name):
            return self._accepts_stacked(name, shape, dtype)
        weight = name.removesuffix(SCALE_SUFFIX)
        self._seen[name] = dtype
        if name in self._redundant:
            return False
        if weight not in self._expected:
            if _HARMLESS.fullmatch(name):
                self._ignored.append(name)
            else:
                self._problems.append(f"extra: {name} {list(shape)}; remove it, or check config.json")
            return False
        wanted = self._expected[weight]
        if name != weight:
            if len(wanted) != 2:
                self._problems.append(f"extra: {name} {list(shape)}, of a tensor that is never in FP8; remove it")
                return False
            wanted = scale_shape(wanted, self._block)
        if shape != wanted:
            self._problems.append(f"misshapen: {name} is {list(shape)}, wanted {list(wanted)}")
            return False
        return True

    def _accepts_stacked(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> bool:
        config = self._config
        parts = expert_parts(name, config)
        if parts[0] not in self._expected:
            self._problems.append(f"extra: {name} {list(shape)}; remove it, or check config.json")
            return False
        self._seen |= dict.fromkeys(parts, dtype)
        inner, hidden = config.expert_ffn_hidden_size, config.hidden_size
        one = (hidden, inner) if name.endswith("down_proj") else (2 * inner, hidden)
        if shape not in ((config.n_routed_experts, *one), (config.num_experts, *one)):
            self._problems.append(f"misshapen: {name} is {list(shape)}, wanted {[config.n_routed_experts, *one]}")
            return False
        return True

    def warn_of_ignored(self) -> None:
        """Say once which tensors are not read and do no harm, if there are any."""
        if self._ignored:
            listed = ", ".join(sorted(self._ignored))
            logger.warning("LongCat-Flash does not read %d tensors of the checkpoint: %s", len(self._ignored), listed)

    def raise_for_unexpected(self) -> None:
        """Raise CheckpointError, listing every extra and misshapen tensor so far, if there are any."""
        self._raise(self._problems)

    def raise_for_all(self, requires_mtp: bool = False) -> None:
        """After the last tensor: raise CheckpointError if any were extra, misshapen or missing; all are listed.

        The MTP layer is complete or absent; with `requires_mtp` it has to be there.
        """
        has_mtp = any(
            name.startswith(MTP_PREFIX) and name.removesuffix(SCALE_SUFFIX) in self._expected for name in self._seen
        )
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
        self._raise(self._problems + missing + self._misquantized())

    def check_scales(self, name: str, scales: Tensor) -> None:
        """Record the values of a tensor of scales, which multiply a weight: each is to be finite and positive."""
        least, greatest = (float(each) for each in scales.aminmax())  # both are NaN if one of them is
        if not 0 < least <= greatest < math.inf:
            wrong = scales[~(scales.isfinite() & (scales > 0))]
            self._problems.append(
                f"wrong: {name} has {wrong.numel()} scales such as {float(wrong[0])}, wanted finite numbers above 0; "
                "convert the checkpoint again"
            )

    def _misquantized(self) -> list[str]:
        """Tensors whose precision is not what the configuration, or the tensor beside them, says."""
        quantization = self._config.quantization
        in_fp8 = [name for name, dtype in self._seen.items() if dtype in _FP8 and not name.endswith(SCALE_SUFFIX)]
        scales = [name for name in self._seen if name.endswith(SCALE_SUFFIX)]
        found = [
            f"missing: {name}{SCALE_SUFFIX}, the scales of an FP8 weight; convert the checkpoint with its scales"
            for name in in_fp8
            if self._seen[name] == FP8 and name + SCALE_SUFFIX not in self._seen
        ]
        found += [
            f"extra: {name}, scales of a weight that is not in FP8; convert the checkpoint again"
            for name in scales
            if self._seen.get(name.removesuffix(SCALE_SUFFIX)) not in _FP8
        ]
        found += [
            f"wrong: {name} is in e5m2, wanted e4m3; convert the checkpoint again"
            for name in in_fp8
            if self._seen[name] == torch.float8_e5m2
        ]
        if found:
            return found
        if quantization is None:
            first = f"{len(in_fp8)} tensors are FP8, {in_fp8[0]} the first" if in_fp8 else ""
            return [f"missing: quantization_config in config.json, while {first}"] if in_fp8 else []
        # Of the MTP layer the tensors that are there decide.
        of_trunk = {name: dtype for name, dtype in self._seen.items() if name in self._expected and not is_mtp(name)}
        for name, dtype in of_trunk.items():
            if dtype in _FP8 and not quantization.is_fp8(name):
                found.append(f"wrong: {name} is in FP8, in config.json it is not; correct ignored_layers")
            elif dtype not in _FP8 and quantization.is_fp8(name):
                found.append(f"wrong: {name} is not in FP8, in config.json it is; add it to ignored_layers")
        return found

    @staticmethod
    def _raise(problems: list[str]) -> None:
        if problems:
            listed = "\n  ".join(problems)
            raise CheckpointError(
                f"the checkpoint does not match its config.json ({len(problems)} problems):\n  {listed}"
            )


def audited(
    weights: Iterable[tuple[str, Tensor]], config: LongcatConfig, *, is_partial: bool
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are to be loaded, one at a time, by their published names: stacked experts come one by one.

    is_partial: missing tensors are no error, as in an update of a running model.

    Raises:
        CheckpointError: listing every tensor that is extra, misshapen or missing: after the last one, or before the
            first of an update whose tensors are all in memory.
    """
    return _audited(weights, all_tensors(config), config, is_partial)


def audited_mtp(
    weights: Iterable[tuple[str, Tensor]], config: LongcatConfig, *, is_partial: bool
) -> Iterator[tuple[str, Tensor]]:
    """As `audited`, where the MTP layer is a model of its own: the model's own tensors are skipped without a check,
    and the layer has to be there. That its embedding is not the model's is logged."""
    mine: Iterable[tuple[str, Tensor]] = (each for each in compared(weights) if each[0].startswith(MTP_PREFIX))
    if isinstance(weights, Collection):
        mine = list(mine)
    return _audited(mine, mtp_tensors(config), config, is_partial, requires_mtp=True)


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
        if name.endswith(SCALE_SUFFIX):
            audit.check_scales(name, tensor)
        if stacked_experts(name):
            yield from zip(expert_parts(name, config), unstacked(name, tensor, config), strict=True)
        else:
            yield name, tensor
    if is_partial:
        audit.raise_for_unexpected()
    else:
        audit.raise_for_all(requires_mtp)
    audit.warn_of_ignored()


def unstacked(name: str, tensor: Tensor, config: LongcatConfig) -> Iterator[Tensor]:
    """What `expert_parts` names, in its order."""
    for expert in tensor[: config.n_routed_experts]:
        yield from expert.chunk(2) if name.endswith("gate_up_proj") else (expert,)
