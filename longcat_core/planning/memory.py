"""Bytes of one GPU: weights, what engines keep back, and what is left for the cache."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from dataclasses import dataclass

from longcat_core.planning.layout import BYTES, Layout, Precision
from longcat_core.planning.models import Model

ROUTER_BYTES = 4
"""Of a weight: fp32 in every engine."""
SHARE = 0.90
"""Of a GPU's memory, that an engine is given; vLLM 0.32's default is 0.92."""
KEPT_BYTES = 4e9
"""For activations, CUDA graphs and communication. aiconfigurator takes 3.9 GiB, SGLang 0.5.21 at least 10 GiB."""


@dataclass(frozen=True)
class Weights:
    """Bytes on one GPU."""

    experts: float
    attention: float
    dense_ffns: float
    router: float
    embeddings: float
    """With the output head."""
    tables: float
    """Of an n-gram embedding."""
    mtp: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def weights(model: Model, layout: Layout, precision: Precision, with_mtp: bool = False) -> Weights:
    """Of the rank that has most.

    Ranks share heads, dense FFNs, embeddings and n-gram tables by tensor parallelism, and experts. Every rank has the
    projections into latent space, the router, the MTP layer's projection of its two inputs, and those of n-grams. The
    MTP layer takes the model's embedding for its own, as engines do. Source: docs/dry-run.md, where vLLM's CUDA build
    allocates as much: 141.9 and 72.0 GB for LongCat-Flash-Chat in bf16 on 8 and 16 GPUs.
    """
    hidden, tp = model.hidden_size, layout.tp
    replicated = model.attention.replicated_parameters(hidden)
    attention = replicated + (model.attention_parameters - replicated) / tp
    ffn = model.ffn_parameters / tp
    moe_layers = model.layers - model.first_dense_layers
    experts = layout.experts_a_rank(model) + model.shared_experts
    embedding = model.vocab_size * hidden / tp * BYTES["bf16"]
    mtp = (attention + ffn + 2 * hidden * hidden) * BYTES[precision.mtp] if with_mtp else 0.0
    tables = 0.0
    if model.tables is not None:
        of_tables = model.tables.table_parameters
        tables = (of_tables / tp + model.tables.parameters(hidden) - of_tables) * BYTES["bf16"]
    dense = model.dense_ffns_a_layer * moe_layers + model.first_dense_layers
    return Weights(
        experts=moe_layers * experts * model.expert_parameters * BYTES[precision.experts],
        attention=model.layers * model.attentions_a_layer * attention * BYTES[precision.attention],
        dense_ffns=dense * ffn * BYTES[precision.dense_ffns],
        router=moe_layers * model.router_parameters * ROUTER_BYTES,
        embeddings=(1 if model.ties_embeddings else 2) * embedding,
        tables=tables,
        mtp=mtp,
    )


def checkpoint_bytes(model: Model, precision: Precision) -> float:
    """Of the published files, in which the MTP layer has an embedding of its own."""
    found = weights(model, Layout(), precision, with_mtp=model.has_mtp).total
    if model.has_mtp:
        found += model.vocab_size * model.hidden_size * BYTES["bf16"]
    if model.mtp_tables and model.tables is not None:
        found += model.tables.parameters(model.hidden_size) * BYTES["bf16"]
    return found


@dataclass(frozen=True)
class Memory:
    """Of one GPU, in bytes; the cache's room is negative where the deployment does not fit."""

    total_bytes: float
    share: float
    kept_bytes: float
    weights: Weights
    cache_bytes_a_token: float
    """On this GPU."""
    allocated_bytes: float | None = None
    """For weights, by an engine in a dry run: in place of what is computed."""

    @property
    def weights_bytes(self) -> float:
        return self.weights.total if self.allocated_bytes is None else self.allocated_bytes

    @property
    def room_bytes(self) -> float:
        return self.total_bytes * self.share - self.kept_bytes - self.weights_bytes

    @property
    def tokens_a_replica(self) -> int:
        """Of context, in all requests of one replica of the attention: the latents of MLA are on each of its ranks."""
        return max(0, math.floor(self.room_bytes / self.cache_bytes_a_token))

    def missing_bytes(self, tokens: float) -> float:
        """How much is missing to cache so many tokens in a replica; 0 if they fit."""
        return max(0.0, tokens * self.cache_bytes_a_token - self.room_bytes)


def memory(
    model: Model,
    layout: Layout,
    precision: Precision,
    gpu_bytes: float,
    *,
    share: float = SHARE,
    kept_bytes: float = KEPT_BYTES,
    with_mtp: bool = False,
    with_mtp_cache: bool = False,
    allocated_bytes: float | None = None,
) -> Memory:
    """with_mtp: whether the MTP layer is loaded. with_mtp_cache: whether it drafts, and so caches tokens of its own."""
    a_token = model.cache_bytes_a_token(precision.cache, with_mtp_cache)
    if model.attention.is_cache_split():
        a_token /= layout.tp
    computed = weights(model, layout, precision, with_mtp)
    return Memory(gpu_bytes, share, kept_bytes, computed, a_token, allocated_bytes)
