"""The least time that a decode step and a prompt can take on a CPU, by its bandwidth and its rate of products."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from longcat_core.planning import calibration
from longcat_core.planning.costs import Cost, Load, head_cost, layer_costs, timed
from longcat_core.planning.cpu import calibrated
from longcat_core.planning.figures import figures_of
from longcat_core.planning.layout import BYTES, Layout, precision
from longcat_core.planning.models import LatentAttention, Model
from longcat_core.planning.rates import Rates

BF16 = precision("bf16")
ONE_RANK = Layout()


class Routed(NamedTuple):
    """What the routers of a decode step chose, as means over layers and steps."""

    experts: float
    """Different FFN experts of a layer, whose weights are read."""
    choices: float
    """FFN experts of a token; its other choices are zero experts."""


@dataclass(frozen=True)
class Floor:
    """Operations follow each other, and each takes as long as its slower resource."""

    seconds: float
    memory_bytes: float
    operations: float
    bound: str
    """"bytes" or "operations": where most of the time is."""


@dataclass(frozen=True)
class Machine:
    rates: Rates
    """Of which the floors use the bandwidth, and one rate for all products."""
    figures: Mapping[str, float]
    """What was measured, by names with their units."""


def measured_machine(sizes: calibration.Sizes = calibration.SIZES) -> Machine:
    """Bandwidth, rates of products, and the time of an operator on almost nothing.

    All products are taken to run at the highest rate of any that was measured, in bf16 or in fp32: weights in bf16 can
    be multiplied in fp32, and on a processor without products in bf16 that is much faster.
    """
    found = calibration.calibrate(sizes, load=lambda: (0.0,))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "calibration.json"
        calibration.write(found, path)
        _, rates = calibrated(path)
    measured: Any = found["figures"]
    figures = {name: each.value for name, each in figures_of(measured).items() if each.kind == "measured"}
    rows = max(sizes.rows)
    in_fp32 = _fp32_products_per_second(rows, *sizes.weights[1:], sizes.seconds)
    figures[f"product_fp32_{rows}_rows_gflops"] = in_fp32 / 1e9
    return Machine(
        with_product_rate(rates, max(in_fp32, *(rate for _, rate in rates.products_per_second["bf16"]))), figures
    )


def with_product_rate(rates: Rates, operations_per_second: float) -> Rates:
    """One rate for all products, those of attention included."""
    return replace(
        rates,
        products_per_second={"bf16": ((1.0, operations_per_second),)},
        attention_per_second=operations_per_second,
        attention_by_context=(),
    )


def decode_floor(model: Model, rates: Rates, requests: int, context: float, routed: Routed) -> Floor:
    """Of a step in which each request gets one token.

    context: cached tokens of a request. Read once each: the dense weights in bf16 (of attention as it is absorbed, so
    `kv_b_proj` by its two halves), the router's in fp32, the experts that were chosen, the cache, the output head.
    Activations, norms and rows of the embedding are not counted.
    """
    load = Load(requests, requests, context, routed.choices)
    costs = _layer(model, rates, load)
    read = routed.experts * model.expert_parameters * BYTES[BF16.experts]
    costs["experts"] = replace(costs["experts"], memory_bytes=read)
    return _floor(model, rates, costs, head_cost(model, ONE_RANK, load))


def prefill_floor(model: Model, rates: Rates, tokens: int) -> Floor:
    """Of one prompt, after which one token is chosen.

    Attention is over keys and values that are expanded from the latents once, and a token sees those up to itself. The
    FFN experts among a token's choices are taken to be as many as among all experts, and the experts of different
    tokens to be independent.
    """
    attention = model.attention
    assert isinstance(attention, LatentAttention)
    costs = _layer(model, rates, Load(1, tokens, tokens, model.ffn_experts_a_token))
    head_dims = attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
    core = Cost(
        memory_bytes=tokens * attention.cached_bytes(BF16.cache),
        attention_operations=tokens * (tokens + 1) / 2 * 2 * attention.heads * head_dims,
    )
    costs |= {name: core for name in costs if name.endswith("_core")}
    return _floor(model, rates, costs, head_cost(model, ONE_RANK, Load(1, 1, tokens, 0)))


def _layer(model: Model, rates: Rates, load: Load) -> dict[str, Cost]:
    costs = layer_costs(model, ONE_RANK, BF16, rates, load)
    costs.pop("identity", None)  # activations alone
    return costs


def _floor(model: Model, rates: Rates, layer: Mapping[str, Cost], head: Cost) -> Floor:
    all_costs = [(model.layers, name, cost) for name, cost in layer.items()] + [(1, "head", head)]
    seconds = {"bytes": 0.0, "operations": 0.0}
    for times, name, cost in all_costs:
        operation = timed(name, cost, rates)
        seconds[operation.bound] += times * operation.seconds
    return Floor(
        seconds=sum(seconds.values()),
        memory_bytes=sum(times * cost.memory_bytes for times, _, cost in all_costs),
        operations=sum(times * (cost.product_operations + cost.attention_operations) for times, _, cost in all_costs),
        bound=max(seconds, key=seconds.__getitem__),
    )


def _fp32_products_per_second(rows: int, columns: int, depth: int, seconds: float) -> float:
    """Operations a second, as `calibration` measures it in bf16."""
    inputs, weight = torch.randn(rows, depth), torch.randn(columns, depth)
    times: list[float] = []
    with torch.inference_mode():
        F.linear(inputs, weight)
        while not times or sum(times) < seconds:
            started = time.perf_counter()
            F.linear(inputs, weight)
            times.append(time.perf_counter() - started)
    return 2 * rows * columns * depth / statistics.median(times)
