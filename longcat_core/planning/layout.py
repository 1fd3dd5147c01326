"""How a model lies on GPUs: in which precision, and over how many ranks attention and experts are split."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from longcat_core.planning.models import CACHE_FORMS, Model

BLOCK_SCALES = 4 / (128 * 128)
"""Bytes of fp32 scales for each byte of FP8 weights, in blocks of 128 x 128."""
BYTES = {"bf16": 2.0, "fp8": 1 + BLOCK_SCALES}
"""Of a weight."""


@dataclass(frozen=True)
class Precision:
    """Of weights ("bf16" or "fp8") and of the cache (one of `CACHE_FORMS`). The router is in fp32, embeddings, output
    head and n-gram tables are in bf16."""

    experts: str = "bf16"
    attention: str = "bf16"
    dense_ffns: str = "bf16"
    mtp: str = "bf16"
    cache: str = "bf16"

    @property
    def release(self) -> str:
        """Of which published files: "bf16" or "fp8"."""
        return self.experts


PRECISIONS = {
    "bf16": ("bf16", "bf16", "bf16", "bf16"),
    "fp8": ("fp8", "bf16", "bf16", "bf16"),
    "fp8-ffns": ("fp8", "bf16", "fp8", "fp8"),
    "fp8-all": ("fp8", "fp8", "fp8", "fp8"),
}
"""Of experts, attention, dense FFNs and the MTP layer."""


def precision(weights: str, cache: str = "bf16") -> Precision:
    """weights: "bf16"; "fp8", of experts alone; "fp8-ffns", of dense FFNs and the MTP layer as well; "fp8-all", of all
    linear layers. Which of an FP8 release's layers are in FP8 its `ignored_layers` say.

    Raises:
        ValueError: if there is no such precision.
    """
    if cache not in CACHE_FORMS:
        raise ValueError(f"cache: {cache!r}, wanted one of {', '.join(CACHE_FORMS)}")
    if weights not in PRECISIONS:
        raise ValueError(f"precision: {weights!r}, wanted one of {', '.join(PRECISIONS)}")
    return Precision(*PRECISIONS[weights], cache)


@dataclass(frozen=True)
class Layout:
    """`tp` ranks share the heads and dense FFNs of one replica of the attention; there are `dp` replicas. `ep` ranks
    have different experts; 1 if every rank has a share of each expert."""

    tp: int = 1
    dp: int = 1
    ep: int = 1

    @property
    def gpus(self) -> int:
        return self.tp * self.dp

    def __str__(self) -> str:
        parts = [
            f"{name.upper()}{size}" for name, size in (("tp", self.tp), ("dp", self.dp), ("ep", self.ep)) if size > 1
        ]
        return " ".join(parts) or "one rank"

    def problems(self, model: Model) -> Iterator[str]:
        """Why the model cannot be split so."""
        if model.attention.heads % self.tp:
            yield f"tp: {self.tp} does not divide {model.attention.heads} heads"
        if model.ffn_hidden_size % self.tp:
            yield f"tp: {self.tp} does not divide dense FFNs of {model.ffn_hidden_size}"
        if self.ep not in (1, self.gpus):
            yield f"ep: {self.ep}, wanted 1 or tp x dp = {self.gpus}"
        if self.ep == 1 and model.expert_hidden_size % self.gpus:
            yield f"ep: 1 splits experts of {model.expert_hidden_size} over {self.gpus} ranks, which does not go"

    def experts_a_rank(self, model: Model) -> float:
        """Whole experts, redundant copies included where the ranks do not divide them; without expert parallelism a
        share of each, as so many whole ones."""
        return math.ceil(model.experts / self.ep) if self.ep > 1 else model.experts / self.gpus

    def redundant_experts(self, model: Model) -> int:
        return int(self.experts_a_rank(model)) * self.ep - model.experts if self.ep > 1 else 0


def layouts(model: Model, gpus: int) -> Iterator[Layout]:
    """All that the model can be split by, with expert parallelism where there are several GPUs."""
    for tp in (2**n for n in range(gpus.bit_length())):
        if gpus % tp == 0:
            found = Layout(tp, gpus // tp, gpus)
            if not list(found.problems(model)):
                yield found
