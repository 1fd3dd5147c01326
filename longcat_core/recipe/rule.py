"""The rule by which a layer stays in bf16: extreme inputs, a large error, or both."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Keep(StrEnum):
    """The layers to keep in bf16, of those with extreme inputs and those with a large error."""

    intersection = "intersection"
    union = "union"
    activation = "activation"
    error = "error"
    none = "none"


@dataclass(frozen=True)
class Thresholds:
    """What is extreme and what is large, as multiples of the median layer's value, each above 1.

    The report (arXiv 2509.01322, section on quantisation) names both lists and the intersection, and no numbers;
    these are ours.
    """

    activation: float = 10.0
    """On the largest input; the median is over all layers, as most of them have normed inputs."""
    relative: float = 1.5
    """On the relative errors of weights and of outputs; the median is over all layers, as that of FP8 is much the same
    for all well-behaved weights."""
    absolute: float = 10.0
    """On the absolute error of the outputs; the median is over the layers of the same kind, as outputs of different
    kinds are on different scales."""


class Score(NamedTuple):
    """Of one layer: its values over their thresholds, so that 1 and more is in the list."""

    activation: float | None
    """None where no token reached the layer."""
    error: float
    """The greatest of the errors'."""

    @property
    def is_extreme(self) -> bool:
        return self.activation is not None and self.activation >= 1

    @property
    def is_large(self) -> bool:
        return self.error >= 1

    def is_kept(self, keep: Keep) -> bool:
        """A layer that no token reached is judged by its weights' error alone."""
        match keep:
            case Keep.intersection:
                return self.is_large and (self.is_extreme or self.activation is None)
            case Keep.union:
                return self.is_large or self.is_extreme
            case Keep.activation:
                return self.is_extreme
            case Keep.error:
                return self.is_large
            case Keep.none:
                return False
