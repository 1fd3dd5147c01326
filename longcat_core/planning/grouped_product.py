"""The expected time of a product with many experts' weights: rows by expert, bytes, tiles, and the slower of the two.

A roofline: a product takes as long as reading and writing each of its bytes once, or as multiplying all tiles that it
is made of, padding included, whichever is longer. What is read again is taken to come from the cache.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from longcat_core.planning.hardware import Gpu

_DEVIATIONS = 12
"""From the mean, within which a number of rows is looked for."""


@dataclass(frozen=True)
class Load:
    """Rows of a rank's experts, where the router likes all experts alike and each token chooses for itself."""

    tokens: int
    """That may choose these experts: of all ranks."""
    experts: int
    """Of this rank."""
    probability: float
    """That a token has a row for one given expert."""

    @property
    def rows(self) -> float:
        return self.tokens * self.experts * self.probability

    @property
    def touched_experts(self) -> float:
        """Experts with any row, whose weights are read."""
        return self.experts * -math.expm1(self.tokens * math.log1p(-self.probability))

    def blocks(self, block_rows: int) -> float:
        """Blocks of so many rows, each of one expert."""
        of_an_expert = sum(-(-rows // block_rows) * share for rows, share in _binomial(self.tokens, self.probability))
        return self.experts * of_an_expert


@dataclass(frozen=True)
class GroupedProduct:
    """One launch: `blocks` of rows, each times the weights [columns, depth] of one expert, `matrices` at once."""

    blocks: float
    block_rows: int
    block_columns: int
    columns: int
    """Of one matrix of the output."""
    depth: int
    matrices: int
    """2 where gate and up are multiplied in one launch, by programs that have both."""
    bytes: float
    """Read and written, each once."""
    has_older_instructions: bool = False
    """Whether the code uses tensor-core instructions of an older architecture."""

    @property
    def programs(self) -> float:
        return self.blocks * math.ceil(self.columns / self.block_columns)

    @property
    def operations_of_a_program(self) -> int:
        """Multiplications and additions, on padding as well."""
        return 2 * self.matrices * self.block_rows * self.block_columns * self.depth

    def memory_seconds(self, gpu: Gpu) -> float:
        return memory_seconds(gpu, self.bytes)

    def product_seconds(self, gpu: Gpu, precision: str) -> float:
        """Programs are shared out evenly; the last of them leave some multiprocessors idle."""
        rate = gpu.operations_per_second[precision] * gpu.assumptions.product_share
        if self.has_older_instructions:
            rate *= gpu.assumptions.older_instructions_share
        rounds = math.ceil(self.programs / gpu.multiprocessors)
        return rounds * self.operations_of_a_program / (rate / gpu.multiprocessors)

    def seconds(self, gpu: Gpu, precision: str) -> float:
        """With its launch."""
        longer = max(self.memory_seconds(gpu), self.product_seconds(gpu, precision))
        return gpu.assumptions.launch_seconds + longer


def memory_seconds(gpu: Gpu, bytes_: float) -> float:
    """Of reading and writing so many bytes, without a launch."""
    return bytes_ / (gpu.bytes_per_second * gpu.assumptions.memory_share)


def pass_seconds(gpu: Gpu, bytes_: float) -> float:
    """Of a launch that does nothing but read and write so many bytes."""
    return gpu.assumptions.launch_seconds + memory_seconds(gpu, bytes_)


def _binomial(trials: int, probability: float) -> Iterator[tuple[int, float]]:
    """Numbers of successes, and how likely each is, within `_DEVIATIONS` of the mean."""
    mean = trials * probability
    reach = _DEVIATIONS * math.sqrt(mean * (1 - probability)) + _DEVIATIONS
    for successes in range(max(0, math.floor(mean - reach)), min(trials, math.ceil(mean + reach)) + 1):
        failures = trials - successes
        ways = math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(failures + 1)
        yield successes, math.exp(ways + successes * math.log(probability) + failures * math.log1p(-probability))
