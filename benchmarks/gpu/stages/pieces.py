"""The small kernels of a MoE layer, each against the chains of operations that an engine has in its place."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import vllm_kernels
from benchmarks.gpu.cases import Case, Context, Row, rows
from benchmarks.gpu.checks import WrongResultError
from benchmarks.gpu.inputs import random_logits
from longcat_core.kernels.arrange import arrange, arrange_reference
from longcat_core.kernels.combine import weighted_sum
from longcat_core.kernels.quantize import quantize
from longcat_core.kernels.route import route
from longcat_core.kernels.router_product import router_product
from longcat_core.layers import routing as reference
from longcat_core.layers.routing import Routing

_BLOCK_ROWS = 16
Kernels = dict[str, Callable[[], Any]]
"""By name: a call that gives the result in one form for all kernels of a piece."""
Piece = Callable[[str], tuple[Callable[[], Any], Callable[[Any], None]]]
"""A kernel's name to its call, and to what raises WrongResultError for a wrong result."""


def stage(context: Context) -> Iterator[Row]:
    for tokens in context.sizes.tokens:
        yield from rows(cases(context, tokens), context)


def cases(context: Context, tokens: int) -> Iterator[Case]:
    for piece, of_piece in PIECES.items():
        make = partial(of_piece, context, tokens)
        for kernel in KERNELS[piece]:
            if kernel != "torch, compiled" or context.sizes.is_compiled:
                fields = {"piece": piece, "tokens": tokens, "kernel": kernel}
                yield Case(fields, partial(_timed, context, make, kernel))


def _timed(context: Context, make: Piece, kernel: str) -> dict[str, Any]:
    call, check = make(kernel)
    check(call())
    return asdict(context.timer(call))


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise WrongResultError(what)


def _close(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    error = float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-30))
    _expect(error <= tolerance, f"{what}: greatest error {error:.2e} of the greatest value, wanted at most {tolerance}")


def _generator(context: Context, tokens: int) -> torch.Generator:
    return torch.Generator(context.device).manual_seed(tokens)


def _router_product(context: Context, tokens: int, kernel: str) -> Any:
    config, generator = context.sizes.config, _generator(context, tokens)
    x = torch.randn(tokens, config.hidden_size, generator=generator, device=context.device).bfloat16()
    weight = torch.randn(config.num_experts, config.hidden_size, generator=generator, device=context.device)
    kernels: Kernels = {
        "ours": lambda: router_product(x, weight),
        "torch": lambda: F.linear(x.float(), weight),
    }
    wanted = F.linear(x.double(), weight.double())
    return kernels[kernel], lambda found: _close(found, wanted, 1e-4, "logits")


def _route(context: Context, tokens: int, kernel: str) -> Any:
    config, generator = context.sizes.config, _generator(context, tokens)
    logits = random_logits(config, tokens, "random", generator)
    bias = torch.zeros(config.num_experts, device=context.device)
    x = torch.randn(tokens, config.hidden_size, generator=generator, device=context.device).bfloat16()
    sizes: dict[str, Any] = {
        "n_routed_experts": config.n_routed_experts,
        "top_k": config.moe_topk,
        "routed_scaling_factor": config.routed_scaling_factor,
    }
    wanted = reference.route(logits, bias, **sizes)
    if kernel == "vLLM":
        in_tree = vllm_kernels.InTreeRouter(config, bias)
        return (lambda: in_tree(x, logits)), partial(_check_in_tree, wanted, x)
    kernels: dict[str, Callable[..., Routing]] = {
        "ours": route,
        "torch": reference.route,
        "torch, compiled": torch.compile(reference.route, dynamic=True),
    }
    return partial(kernels[kernel], logits, bias, **sizes), partial(_check_routing, wanted)


def _check_routing(wanted: Routing, found: Routing) -> None:
    """Sums that differ by their rounding may be in another order, so weights are compared in order of size."""
    _close(found.weights.sort(dim=-1).values, wanted.weights.sort(dim=-1).values, 1e-4, "weights")
    _close(found.identity, wanted.identity, 1e-4, "identity")
    differing = float((found.ids.sort(dim=-1).values != wanted.ids.sort(dim=-1).values).float().mean())
    _expect(differing < 1e-3, f"ids: {differing:.2%} differ")


def _check_in_tree(wanted: Routing, x: Tensor, found: tuple[Tensor, Tensor, Tensor]) -> None:
    weights, ids, zero = found
    _close(weights.sort(dim=-1).values, wanted.weights.sort(dim=-1).values, 1e-4, "weights")
    _close(zero, wanted.identity.unsqueeze(-1) * x.float(), 1e-2, "the zero experts' output")
    differing = float((ids.sort(dim=-1).values != wanted.ids.clamp(min=0).sort(dim=-1).values).float().mean())
    _expect(differing < 1e-3, f"ids: {differing:.2%} differ")


def _ids_and_map(context: Context, tokens: int) -> tuple[Routing, Tensor, int]:
    """A routing, and the map of the rank that has the first of the experts."""
    config, local = context.sizes.config, context.sizes.deployments[0].local_experts
    logits = random_logits(config, tokens, "random", _generator(context, tokens))
    routing = reference.route(
        logits,
        torch.zeros(config.num_experts, device=context.device),
        n_routed_experts=config.n_routed_experts,
        top_k=config.moe_topk,
        routed_scaling_factor=config.routed_scaling_factor,
    )
    expert_map = torch.full((config.n_routed_experts,), -1, dtype=torch.int32, device=context.device)
    expert_map[:local] = torch.arange(local, dtype=torch.int32, device=context.device)
    return routing, expert_map, local


def _arrange(context: Context, tokens: int, kernel: str) -> Any:
    routing, expert_map, local = _ids_and_map(context, tokens)
    of_all = expert_map.shape[0]
    kernels: Kernels = {
        "ours": lambda: arrange(routing.ids, local, _BLOCK_ROWS, expert_map)[:3],
        "vLLM": lambda: vllm_kernels.arrange(routing.ids, of_all, _BLOCK_ROWS, expert_map),
    }
    slots, experts, used = arrange_reference(routing.ids, local, _BLOCK_ROWS, expert_map)

    def by_expert(of_blocks: Tensor, of_rows: Tensor) -> Tensor:
        """Rows of an expert in any order, as atomics leave them."""
        return (of_blocks.long().repeat_interleave(_BLOCK_ROWS) * (routing.ids.numel() + 1) + of_rows).sort().values

    def check(found: tuple[Tensor, Tensor, Tensor]) -> None:
        _expect(int(found[2]) == used, f"{int(found[2])} rows, wanted {used}")
        blocks = used // _BLOCK_ROWS
        wanted = by_expert(*(torch.tensor(part, device=context.device) for part in (experts, slots)))
        is_same = torch.equal(by_expert(found[1][:blocks], found[0][:used].long()), wanted)
        _expect(is_same, "rows are not those of their experts")

    return kernels[kernel], check


def _combine(context: Context, tokens: int, kernel: str) -> Any:
    config, generator = context.sizes.config, _generator(context, tokens)
    routing, expert_map, _ = _ids_and_map(context, tokens)
    shape = (tokens, config.moe_topk, config.hidden_size)
    outputs = torch.randn(shape, generator=generator, device=context.device, dtype=torch.bfloat16)
    local = torch.where(routing.ids >= 0, expert_map[routing.ids.clamp(min=0).long()], -1)
    kept = (local >= 0).unsqueeze(-1)
    weighted = torch.where(kept, outputs.float() * routing.weights.unsqueeze(-1), 0.0)
    wanted = weighted.sum(dim=1)
    in_bf16 = weighted.bfloat16()

    def chain(outputs: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
        return torch.where(kept, outputs.float() * weights.unsqueeze(-1), 0.0).sum(dim=1).to(outputs.dtype)

    inputs = (outputs, routing.weights, kept)
    compiled = torch.compile(chain, dynamic=True)
    kernels: Kernels = {
        "ours": lambda: weighted_sum(outputs, local, routing.weights, torch.empty_like(outputs[:, 0])),
        "torch": lambda: chain(*inputs),
        "torch, compiled": lambda: compiled(*inputs),
        "vLLM": lambda: vllm_kernels.combine(in_bf16, routing.ids, expert_map),
    }
    return kernels[kernel], lambda found: _close(found, wanted, 0.02, "the sum")


def _quantize(context: Context, tokens: int, kernel: str) -> Any:
    generator = _generator(context, tokens)
    x = torch.randn(tokens, context.sizes.config.hidden_size, generator=generator, device=context.device).bfloat16()
    kernels: Kernels = {"ours": lambda: quantize(x), "vLLM": lambda: vllm_kernels.quantize(x)}

    def check(found: tuple[Tensor, Tensor]) -> None:
        codes, scales = found
        back = codes.float() * scales.repeat_interleave(128, dim=1)[:, : x.shape[1]]
        _close(back, x, 2**-4, "what comes back")

    return kernels[kernel], check


PIECES = {
    "route": _route,
    "arrange": _arrange,
    "combine": _combine,
    "router product": _router_product,
    "rows in FP8": _quantize,
}
KERNELS = {
    "route": ("ours", "torch", "torch, compiled", "vLLM"),
    "arrange": ("ours", "vLLM"),
    "combine": ("ours", "torch", "torch, compiled", "vLLM"),
    "router product": ("ours", "torch"),
    "rows in FP8": ("ours", "vLLM"),
}
"""What there is for each piece. vLLM's `combine` is given outputs that are weighted already."""
