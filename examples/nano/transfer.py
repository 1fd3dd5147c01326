"""Hyperparameter transfer: from what was found to train a narrow model well, the proxy, to a wider one.

The rules are those of the report (arXiv 2509.01322, table 1), which takes them from Everett et al. (arXiv 2407.05872),
Adam with full alignment in the standard parameterization. With s, the width over the proxy's (8 in the report, 6144
over 768): a matrix whose inputs are s times as many begins with a variance of 1 / s, and learns at a rate of 1 / s. An
embedding is looked up, not summed over, and keeps both. Depth, experts, choices and batch are the proxy's.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from enum import StrEnum
from typing import NamedTuple

from torch import Tensor


class Kind(StrEnum):
    """Of a parameter."""

    embedding = "embedding"
    hidden = "hidden"
    """Every matrix between embedding and head: attention's projections, dense FFNs, experts, routers, `eh_proj`."""
    unembedding = "unembedding"
    norm = "norm"


class Exponents(NamedTuple):
    """Of s, for what is multiplied by a power of it."""

    variance: int
    """Of the initial weights."""
    learning_rate: int


RULES = {
    Kind.embedding: Exponents(0, 0),
    Kind.hidden: Exponents(-1, -1),
    Kind.unembedding: Exponents(-1, -1),
    # Not in the table. A norm's weights multiply one feature each, so nothing is summed over the width.
    Kind.norm: Exponents(0, 0),
}


def kind(name: str, parameter: Tensor) -> Kind:
    """By the name within the model or within its MTP layer, and the shape."""
    if parameter.dim() == 1:
        return Kind.norm
    if name.endswith("embed_tokens.weight"):
        return Kind.embedding
    return Kind.unembedding if name == "lm_head.weight" else Kind.hidden


def std_share(of: Kind, width_ratio: float) -> float:
    """What the standard deviation of the proxy's initial weights is multiplied by; width_ratio: s."""
    return math.sqrt(width_ratio ** RULES[of].variance)


def learning_rate_share(of: Kind, width_ratio: float) -> float:
    """What the proxy's learning rate is multiplied by; width_ratio: s."""
    return float(width_ratio ** RULES[of].learning_rate)
