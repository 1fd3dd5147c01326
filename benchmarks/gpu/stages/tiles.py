"""Every tile that may be the best one for `kernels.experts`, by rows an expert: data for `kernels.tiles`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import our_kernels
from benchmarks.gpu.cases import Case, Context, Row, rows
from benchmarks.gpu.checks import LIMITS, check, truth
from benchmarks.gpu.inputs import Batch, cost, random_batch, random_weights
from longcat_core.config import LongcatConfig
from longcat_core.kernels.arrange import arrange
from longcat_core.kernels.experts import ExpertWeights, expert_outputs
from longcat_core.kernels.tiles import Tile
from longcat_core.layers.experts import add_identity
from longcat_core.weights.blocks import scale_shape

_COMPILED_FOR = (16, 1)
"""Tokens: whether the number of choices is a multiple of 16 makes other code."""


def stage(context: Context) -> Iterator[Row]:
    config, deployment = context.sizes.config, context.sizes.deployments[0]
    for precision in context.sizes.precisions:
        tiles = context.sizes.tiles[precision]
        refused = compile_all(config, precision, tiles, context)
        weights = random_weights(config, deployment.local_experts, precision, context.device)
        for tokens in context.sizes.tile_tokens:
            mean = slots_per_expert(config, tokens)
            batch = random_batch(config, deployment, tokens, "random", False, context.device)
            wanted = truth(batch, weights)
            cases = []
            for tile in tiles:
                fields = {"precision": precision, "tokens": tokens, "slots_per_expert": mean, "tile": asdict(tile)}
                if is_worth_trying(tile, mean):
                    call = partial(_run, context, batch, weights, tile, wanted, precision, refused.get(tile))
                    cases.append(Case(fields, call))
            yield from rows(cases, context)


def slots_per_expert(config: LongcatConfig, tokens: int) -> int:
    """As `kernels.moe` asks the table: of all ranks' experts, zero experts' slots included."""
    return -(-tokens * config.moe_topk // config.n_routed_experts)


def is_worth_trying(tile: Tile, slots: int) -> bool:
    """Blocks of more rows than an expert has are padding; of far fewer, weights are read again and again."""
    return slots <= 4 * tile.rows and tile.rows <= max(16, 4 * slots)


def _run(
    context: Context,
    batch: Batch,
    weights: ExpertWeights,
    tile: Tile,
    wanted: Tensor,
    precision: str,
    refusal: str | None,
) -> dict[str, Any]:
    if refusal is not None:
        raise RuntimeError(refusal)

    def call() -> Tensor:
        return our_kernels.with_tile(batch, weights, tile)

    whole = add_identity(call(), batch.hidden_states, batch.routing.identity)
    error = check(whole, wanted, LIMITS[precision])
    return {**asdict(context.timer(call)), "worst_token_error": error, **asdict(cost(batch, weights))}


def compile_all(config: LongcatConfig, precision: str, tiles: tuple[Tile, ...], context: Context) -> dict[Tile, str]:
    """Fill Triton's cache in several processes at once. Returns tiles that cannot be compiled or launched, and why.

    A tile whose process died is not among them, nor are those that were waiting for it: they are compiled when timed.
    """
    method = multiprocessing.get_context("forkserver")
    method.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(context.sizes.compilers, mp_context=method) as pool:
        of_tiles: dict[Tile, Future[None]] = {
            tile: pool.submit(compile_tile, config, precision, tile, context.device) for tile in tiles
        }
        errors = {tile: future.exception() for tile, future in of_tiles.items()}
    found = {tile: error for tile, error in errors.items() if error and not isinstance(error, BrokenProcessPool)}
    return {tile: f"{type(error).__name__}: {error}"[:500] for tile, error in found.items()}


def compile_tile(config: LongcatConfig, precision: str, tile: Tile, device: torch.device) -> None:
    """Launch both products once, of one expert: the code is that of any number of them."""
    hidden, inner = config.hidden_size, config.expert_ffn_hidden_size
    dtype = torch.float8_e4m3fn if precision == "fp8" else torch.bfloat16
    weights = [torch.zeros(1, *shape, dtype=dtype, device=device) for shape in ((2 * inner, hidden), (hidden, inner))]
    scales = []
    if precision == "fp8":
        scales = [torch.ones(1, *scale_shape(weight.shape[1:], (128, 128)), device=device) for weight in weights]
    for tokens in _COMPILED_FOR:
        ids = torch.zeros(tokens, config.moe_topk, dtype=torch.int32, device=device)
        x = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device=device)
        expert_outputs(x, arrange(ids, 1, tile.rows), ExpertWeights(*weights, *scales), tile)
    if device.type == "cuda":
        torch.cuda.synchronize()
