"""Which FP8 weights an engine keeps as they are published; the others are multiplied by their scales when loaded."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.quantization import PUBLISHED_BLOCK
from longcat_core.weights.audit import CheckpointError
from longcat_core.weights.blocks import FP8, dequantize_blocks
from longcat_core.weights.names import MTP_PREFIX, SCALE_SUFFIX, all_tensors, is_mtp
from longcat_core.weights.plan import Target

_SPLIT_BY_ROWS = ("q_b_proj", "kv_b_proj", "gate_proj", "up_proj")
_SPLIT_BY_COLUMNS = ("o_proj", "down_proj")


class Fp8Kernels(Protocol):
    """Which FP8 layers a device can compute, with blocks of 128 x 128."""

    def take_linear(self, projections: Sequence[str], rows: Sequence[int], columns: int) -> bool:
        """Whether published projections can be one linear layer: the rows of each on one rank, and their columns."""

    def take_experts(self, inner: int, hidden: int) -> bool:
        """Whether FFN experts of these sizes on one rank can be computed."""


class Precision:
    """Decides for each linear layer of an engine's model whether it is in FP8.

    It is if every weight that it holds is published so, in blocks of 128 x 128 that ranks and fused weights do not
    cut, and the device has a kernel for it. Modules are named as the engine names them.
    """

    def __init__(
        self,
        config: LongcatConfig,
        packed: Mapping[str, Sequence[str]],
        kernels: Fp8Kernels,
        drafter: tuple[str, Collection[str]] | None = None,
    ) -> None:
        """
        packed: the published projections that a module of the engine's fuses, the first one's rows first.
        drafter: of a model that is the MTP layer, what the engine calls the layer, and its published weights that the
            files have in FP8: there they decide, and not `config.json`.
        """
        self._config, self._packed, self._kernels = config, packed, kernels
        self._tensors = all_tensors(config)
        self._layer, self._mtp_weights = drafter if drafter is not None else ("", ())

    def keeps(self, module: str, ranks: int) -> bool:
        """Whether a linear layer is in FP8. ranks: over which Megatron's tensor parallelism splits such layers."""
        parent, _, projection = self._published(module).rpartition(".")
        projections = self._packed.get(projection, [projection])
        names = [f"{parent}.{each}.weight" for each in projections]
        if not all(self._is_fp8(name) for name in names):
            return False
        shapes = [self._tensors[name] for name in names]
        is_split_by_rows = ranks > 1 and projections[0] in _SPLIT_BY_ROWS
        is_split_by_columns = ranks > 1 and projections[0] in _SPLIT_BY_COLUMNS
        rows = [shape[0] // ranks if is_split_by_rows else shape[0] for shape in shapes]
        columns = shapes[0][1] // ranks if is_split_by_columns else shapes[0][1]
        # What comes after a part, in this weight or on the next rank, begins with a block of its own.
        followed = rows if is_split_by_rows else rows[:-1]
        if any(size % PUBLISHED_BLOCK[0] for size in followed):
            return False
        if is_split_by_columns and columns % PUBLISHED_BLOCK[1]:
            return False
        return self._kernels.take_linear(projections, rows, columns)

    def keeps_experts(self, module: str, ranks: int) -> bool:
        """Whether the FFN experts of a layer are in FP8: in an engine all of them are, or none.

        ranks: over which each expert is split; 1 where whole experts are spread over ranks.
        """
        config = self._config
        names = (
            f"{module}.{expert}.{projection}_proj.weight"
            for expert in range(config.n_routed_experts)
            for projection in ("gate", "up", "down")
        )
        if not all(self._is_fp8(name) for name in names):
            return False
        return self._kernels.take_experts(config.expert_ffn_hidden_size // ranks, config.hidden_size)

    def _is_fp8(self, name: str) -> bool:
        quantization = self._config.quantization
        if quantization is None or quantization.block != PUBLISHED_BLOCK or name not in self._tensors:
            return False
        return name in self._mtp_weights if is_mtp(name) else quantization.is_fp8(name)

    def _published(self, module: str) -> str:
        if not self._layer:
            return module
        return module.replace(f"{self._layer}.", f"{MTP_PREFIX}layers.0.", 1)


def is_kept(plan: Mapping[str, Target], parameters: Collection[str], weight: str) -> bool:
    """Whether a published weight stays in FP8 in an engine's model, which then has a parameter for its scales, or
    belongs to another stage or model and is not read. plan: as `load_plan`; parameters: the names of the model's."""
    target, scales = plan.get(weight), plan.get(weight + SCALE_SUFFIX)
    return target is None or scales is None or target.parameter not in parameters or scales.parameter in parameters


def require_precision(name: str, tensor: Tensor, parameter: Tensor | None) -> None:
    """For updates of a model that runs, which may leave out what the first load has to have.

    parameter: what a published tensor is to be loaded into; None if the model has no such parameter.

    Raises:
        CheckpointError: if one of the two is in FP8 and the other is not, or in another one, or if scales come without
            such a weight.
    """
    if parameter is None:
        raise CheckpointError(f"extra: {name}, scales of a weight that the running model has not in FP8; remove it")
    if tensor.dtype != parameter.dtype and 1 in (tensor.dtype.itemsize, parameter.dtype.itemsize):
        raise CheckpointError(
            f"wrong: {name} is {tensor.dtype}, wanted {parameter.dtype} as in the running model; convert it, or start "
            "the model from such a checkpoint"
        )


def dequantized(
    weights: Iterable[tuple[str, Tensor]],
    config: LongcatConfig,
    is_kept: Callable[[str], bool],
    log: logging.Logger,
    waiting: dict[str, Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Tensors by their published names. An FP8 weight that is not kept comes in fp32, multiplied by its scales, which
    do not come; everything else comes as it is. At the end one line of an engine's log counts the former.

    waiting: of an update in many calls, what came without its other half, which may be in the next; nothing is logged.

    Raises:
        CheckpointError: after the last tensor, if an FP8 weight or its scales did not come, unless they may come later.
    """
    if config.quantization is None:
        yield from weights
        return
    may_come_later = waiting is not None
    waiting = {} if waiting is None else waiting
    found: Counter[str] = Counter()
    size = 0
    for name, tensor in weights:
        weight = name.removesuffix(SCALE_SUFFIX)
        if is_kept(weight) or (name == weight and tensor.dtype != FP8):
            yield name, tensor
            continue
        waiting[name] = tensor
        scales = weight + SCALE_SUFFIX
        if weight in waiting and scales in waiting:
            expanded = dequantize_blocks(waiting.pop(weight), waiting.pop(scales), block=config.quantization.block)
            found[weight.split(".")[-2]] += 1
            size += expanded.numel()
            yield weight, expanded
        else:
            waiting[name] = tensor.clone()  # some loaders read the next tensor into the same memory
    if may_come_later:
        return
    if waiting:
        first = next(iter(waiting))
        other = first.removesuffix(SCALE_SUFFIX) if first.endswith(SCALE_SUFFIX) else first + SCALE_SUFFIX
        raise CheckpointError(
            f"missing: {other}, without which {first} cannot be read; give both ({len(waiting)} such)"
        )
    if found:
        log.info(
            "LongCat: %d FP8 weights (%s) are dequantised, as this device or this split has no FP8 kernel for them, or "
            "what they are fused with is not in FP8. They take %.2f GB in bfloat16, %.2f GB more than in FP8.",
            found.total(),
            ", ".join(f"{count} {kind}" for kind, count in sorted(found.items())),
            2 * size / 1e9,
            size / 1e9,
        )
