"""Routing for simulations of expert parallelism: drawn for routers of LongCat-Flash's shape, or LongCat-Nano's.

A step is the ids of its tokens in one layer, int32 [tokens, K], -1 where a zero expert was chosen. Time is in windows:
between two of them tokens drift.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.random import Generator
from tokenizers import Tokenizer

from longcat_core.inspection import routings
from longcat_core.parallel.placement import Floats, Ints
from longcat_core.reference import LongcatForCausalLM
from longcat_nano import CHECKPOINT

EXPERTS, ZERO, TOP_K = 512, 256, 12
POOL = 32768
"""Tokens that are drawn once for all topics of a layer; those of steps are drawn from them."""


class Routing(Protocol):
    experts: int

    def steps(self, window: int, number: int, tokens: int, generator: Generator) -> Iterator[Ints]:
        """So many steps of a window."""


class Zipf:
    """The expert of rank n is wanted n^-0.4 as much as the first. `drift`: so much more of the tokens go by another
    order of experts from window to window."""

    experts = EXPERTS

    def __init__(self, drift: float, generator: Generator) -> None:
        self._drift = drift
        popularity = -0.4 * np.log(np.arange(1, EXPERTS + 1))
        self._pools = _pools(np.stack([generator.permutation(popularity) for _ in range(2)]), generator)

    def steps(self, window: int, number: int, tokens: int, generator: Generator) -> Iterator[Ints]:
        for _ in range(number):
            yield _drawn(self._pools, np.array([1 - self._drift * window, self._drift * window]), tokens, generator)


class Topics:
    """Each token is about one of 32 topics, whose popularities of experts are drawn from a Dirichlet distribution with
    0.1 for each expert. A topic's log share of tokens is normal, and walks at random by `drift` a window; from step to
    step it varies by 0.2 around that."""

    experts, topics = EXPERTS, 32

    def __init__(self, drift: float, generator: Generator) -> None:
        popularity = generator.gamma(0.1, size=(self.topics, EXPERTS))
        self._pools = _pools(np.log(popularity + 1e-30), generator)
        walk = generator.normal(size=(16, self.topics))
        walk[1:] *= drift
        self._log_shares = walk.cumsum(axis=0)

    def steps(self, window: int, number: int, tokens: int, generator: Generator) -> Iterator[Ints]:
        for _ in range(number):
            shares = np.exp(self._log_shares[window] + 0.2 * generator.normal(size=self.topics))
            yield _drawn(self._pools, shares / shares.sum(), tokens, generator)


class Nano:
    """A layer of LongCat-Nano that reads the standard library's sources, 24 other files in each window."""

    def __init__(self, choices: Ints, experts: int) -> None:
        """choices: [files, tokens of each, K]."""
        self._choices, self.experts = choices, experts

    def steps(self, window: int, number: int, tokens: int, generator: Generator) -> Iterator[Ints]:
        choices = self._choices[24 * window : 24 * (window + 1)].reshape(-1, self._choices.shape[-1])
        for _ in range(number):
            yield choices[generator.integers(len(choices), size=tokens)]


def read_nano(windows: int, tokens: int = 256) -> list[Nano]:
    """Its layers."""
    model, tokenizer = (
        LongcatForCausalLM.from_checkpoint(CHECKPOINT),
        Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")),
    )
    texts = (file.read_text(errors="replace") for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    files = [ids[:tokens] for text in texts if len(ids := tokenizer.encode(text).ids) >= tokens][: 24 * windows]
    with torch.no_grad(), routings(model) as noted:
        for part in torch.tensor(files).split(24):
            model(part)
    layers = model.config.num_layers
    return [
        Nano(
            torch.cat([routing.ids for routing in noted[layer::layers]]).reshape(len(files), tokens, -1).numpy(),
            model.config.n_routed_experts,
        )
        for layer in range(layers)
    ]


def _pools(log_popularity: Floats, generator: Generator) -> Ints:
    """log_popularity [topics, EXPERTS] -> choices of tokens [topics, tokens, TOP_K].

    A token takes the greatest of the log popularities plus Gumbel noise, which is drawing without replacement by
    popularity. Zero experts are all alike, wanted by each token more or less, and a third of all choices.
    """
    topics = len(log_popularity)
    noise = generator.gumbel(size=(topics, POOL // topics, EXPERTS + ZERO)).astype(np.float32)
    noise[..., :EXPERTS] += log_popularity[:, None]
    noise[..., EXPERTS:] += generator.normal(size=(*noise.shape[:2], 1))
    few, below, above = noise[:, : 1024 // topics].copy(), -30.0, 30.0
    while above - below > 1e-3:
        middle = (below + above) / 2
        shifted = np.concatenate([few[..., :EXPERTS], few[..., EXPERTS:] + middle], axis=-1)
        is_too_many = (_top(shifted) >= EXPERTS).mean() > 1 / 3
        below, above = (below, middle) if is_too_many else (middle, above)
    noise[..., EXPERTS:] += below
    chosen = _top(noise)
    return np.where(chosen < EXPERTS, chosen, -1)


def _top(scores: Floats) -> Ints:
    return np.argpartition(-scores, TOP_K, axis=-1)[..., :TOP_K]


def _drawn(pools: Ints, shares: Floats, tokens: int, generator: Generator) -> Ints:
    topics, size, _ = pools.shape
    return pools[generator.choice(topics, size=tokens, p=shares), generator.integers(size, size=tokens)]
