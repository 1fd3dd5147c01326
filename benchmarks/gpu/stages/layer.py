"""A whole LongCat layer in a decode step as one CUDA graph: with our MoE and with vLLM's, on one stream and on two."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.cases import Case, Context, MissingError, Row, rows
from benchmarks.gpu.checks import check
from benchmarks.gpu.layer import AttentionCore, RankLayer, two_products
from benchmarks.gpu.layer_moe import our_moe, reference_moe, vllm_moe
from benchmarks.gpu.vllm_kernels import FlashAttention3

LIMIT = 0.1
"""Of the worst token's error: of two experts that are nearly alike, another router may choose the other one."""


def stage(context: Context) -> Iterator[Row]:
    sizes = context.sizes
    made: list[RankLayer] = []
    for tokens in sizes.layer_tokens:
        cases = []
        for kernels in ("ours", "vLLM"):
            for streams in sizes.layer_streams:
                fields = {"tokens": tokens, "ranks": sizes.layer_ranks, "moe": kernels, "streams": streams}
                cases.append(Case(fields, partial(_run, context, made, tokens, kernels, streams)))
        yield from rows(cases, context)


def _run(context: Context, made: list[RankLayer], tokens: int, kernels: str, streams: int) -> dict[str, Any]:
    sizes, config = context.sizes, context.sizes.config
    if not made:
        local = config.n_routed_experts // sizes.layer_ranks
        made.append(RankLayer(config, sizes.layer_ranks, local, "16 bit", context.device))
    layer = made[0]
    makers = {"ours": our_moe, "vLLM": vllm_moe}
    moe = makers[kernels](layer, context)
    name, core = attention_core(context, tokens, 1, sizes.layer_context)
    step, x = layer.step(tokens, 1, sizes.layer_context), layer.hidden_states(tokens)
    side = torch.cuda.Stream() if streams == 2 else None
    call = partial(layer, x, step, moe, core, side)
    error = check(call(), layer(x, step, reference_moe(layer), two_products), LIMIT)
    return {**asdict(context.timer(call)), "worst_token_error": error, "attention": name}


def attention_core(context: Context, requests: int, new_tokens: int, length: int) -> tuple[str, AttentionCore]:
    """vLLM's where it is there and runs, else torch's; with its name."""
    config, device = context.sizes.config, context.device
    try:
        core = FlashAttention3(requests, new_tokens, length, device)
        latent, rope = (
            torch.zeros(requests * new_tokens, 1, size, dtype=torch.bfloat16, device=device)
            for size in (config.kv_lora_rank, config.qk_rope_head_dim)
        )
        core(latent, rope, torch.zeros(requests, length, config.latent_dim, dtype=torch.bfloat16, device=device), 1.0)
    except (MissingError, ImportError, ValueError, RuntimeError, AssertionError):
        return "two products", two_products
    return "FlashAttention 3", core
