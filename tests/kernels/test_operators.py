"""The kernels as operators: the same results, with shapes that a compiler knows, and nothing for it to look into."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longcat_core.kernels import moe, operators
from longcat_core.kernels import route as routing
from longcat_core.kernels import router_product as router
from longcat_core.kernels.experts import ExpertWeights

SIZES = {"n_routed_experts": 6, "top_k": 4, "routed_scaling_factor": 6.0}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def weights() -> ExpertWeights:
    return ExpertWeights(drawn(6, 32, 24) * 24**-0.5, drawn(6, 24, 16) / 4)


def choices() -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[0, -1, 5, 2], [-1, -1, 3, 1], [4, 4, -1, 0]], dtype=torch.int32)
    return ids, drawn(3, 4).abs()


CALLS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "router product": (
        lambda: operators.router_product(drawn(3, 24), drawn(10, 24)),
        lambda: router.router_product(drawn(3, 24), drawn(10, 24)),
    ),
    "route": (
        lambda: operators.route(drawn(3, 10), drawn(10), **SIZES),
        lambda: routing.route(drawn(3, 10), drawn(10), **SIZES),
    ),
    "experts": (
        lambda: operators.routed_experts(drawn(3, 24), *choices(), weights(), "NVIDIA X", spread_over=6),
        lambda: moe.routed_experts(drawn(3, 24), *choices(), weights(), "NVIDIA X", spread_over=6),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_operator_is_its_kernel(name: str) -> None:
    operator, kernel = CALLS[name]
    ours, wanted = operator(), kernel()
    pairs = [(ours, wanted)] if isinstance(wanted, Tensor) else list(zip(ours, wanted, strict=True))
    assert all(torch.equal(one, other) for one, other in pairs)


def test_what_a_compiler_is_told_of_an_operator_is_so() -> None:
    ops, experts = torch.ops.longcat, weights()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.router_product.default, (drawn(3, 24), drawn(10, 24)), test_utils=checks)
    torch.library.opcheck(ops.route.default, (drawn(3, 10), drawn(10), 6, 4, 6.0), test_utils=checks)
    given = (drawn(3, 24), *choices(), experts.w13, experts.w2, None, None, "NVIDIA X", 6)
    torch.library.opcheck(ops.routed_experts.default, given, test_utils=checks)


def test_torch_compile_takes_a_layer_for_any_number_of_tokens_in_one_graph() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    def layer(x: Tensor, router_weight: Tensor, bias: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        chosen = operators.route(operators.router_product(x, router_weight), bias, **SIZES)
        routed = operators.routed_experts(x, chosen.ids, chosen.weights, ExpertWeights(w13, w2), "NVIDIA X", 6)
        return routed + chosen.identity.unsqueeze(1) * x

    experts = weights()
    given = (drawn(10, 24), drawn(10), experts.w13, experts.w2)
    compiled = torch.compile(layer, backend=count, fullgraph=True, dynamic=True)
    for tokens in (3, 5):
        torch.testing.assert_close(compiled(drawn(tokens, 24), *given), layer(drawn(tokens, 24), *given))
    assert len(graphs) == 1
