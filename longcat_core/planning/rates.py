"""How fast a machine is taken to be: data-sheet rates, and the shares of them that are reached (data/rates.json)."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longcat_core.planning.figures import Figure, figures_of
from longcat_core.planning.hardware import DATA, Gpu, read

SETS = DATA / "rates.json"
LATENCIES = DATA / "all_to_all.json"
USED = (
    *("memory_mib", "memory_tb_per_s", "bf16_tflops", "fp8_tflops", "attention_tflops"),
    *("nvlink_gb_per_s", "nvlink_gpus", "nic_gb_per_s", "all_to_all_gb_per_s"),
)
"""Of a machine's figures, in a plan."""


@dataclass(frozen=True)
class Rates:
    """Rates that are reached, and what a step is made of."""

    name: str
    about: str
    memory_bytes_per_second: float
    products_per_second: Mapping[str, Sequence[tuple[float, float]]]
    """By precision: rows of the activations, and operations a second at so many; between them in proportion."""
    attention_per_second: float
    """Operations of MLA's core."""
    fp8_cache_speedup: float
    """Of that, with a cache in FP8."""
    inside_bytes_per_second: float
    """NVLink, one way."""
    outside_bytes_per_second: float
    """All-to-all over the network, one way, for each GPU."""
    gpus_inside: int
    """Connected by NVLink; 1 if every byte is to count as going over the network."""
    overlap_share: float
    """Of the shorter of two things that run beside each other, how much is saved."""
    layer_seconds: float
    """Fixed cost of a ScMoE layer, whatever the batch: launches and gaps; half of it for a layer of one attention."""
    has_latency: bool
    """Whether an all-to-all has a fixed cost of its own, beside `layer_seconds`."""
    has_imbalance: bool
    reads_every_expert: bool
    """Whether all experts of a rank are read in each step, however few tokens there are."""
    splits_batches: bool
    """Whether two batches at once read weights twice; the report's formula does not have it."""
    omitted: frozenset[str]
    """Operations that are not counted."""
    figures: tuple[Figure, ...]
    """What of this is assumed."""
    memory_bytes: float = 0.0
    """Of one device."""
    attention_by_context: Sequence[tuple[float, float]] = ()
    """Where that of MLA's core depends on the cached tokens of a request: those, and operations a second."""
    few_rows: float = math.inf
    """Tokens of a step up to which `layer_seconds` is right."""
    many_rows_layer_seconds: float = 0.0
    """In place of it in a step of more."""
    layer_request_seconds: float = 0.0
    """More of it for each request."""
    step_seconds: float = 0.0
    """Fixed cost of a step, outside of the layers."""
    request_seconds: float = 0.0
    """More of it for each request."""
    cache_bytes: float = 0.0
    """Of a processor's cache, in which a small model stays."""
    in_cache: Rates | None = None
    """Rates of a model that does."""

    def products(self, precision: str, rows: float) -> float:
        """Operations a second of a product with so many rows of activations."""
        return _between(self.products_per_second[precision], rows)

    def attention(self, context: float) -> float:
        """Operations a second of MLA's core over so many cached tokens of a request."""
        return _between(self.attention_by_context, context) if self.attention_by_context else self.attention_per_second

    def overhead_seconds(self, requests: float, rows: float) -> float:
        """Fixed cost of a ScMoE layer in a step of so many tokens."""
        layer = self.layer_seconds if rows <= self.few_rows else self.many_rows_layer_seconds
        return layer + requests * self.layer_request_seconds

    def all_to_all_seconds(self, way: str, ranks: int) -> float:
        """Fixed cost of "dispatch" or "combine" over so many ranks."""
        if not self.has_latency or ranks <= 1:
            return 0.0
        figures = figures_of(read(LATENCIES))
        sizes = sorted(int(name.split("_")[1]) for name in figures if name.startswith(way))
        size = next((size for size in sizes if size >= ranks), sizes[-1])
        return figures[f"{way}_{size}_ranks_us"].value * 1e-6

    def sum_seconds(self, ranks: int) -> float:
        """Fixed cost of a sum over so many ranks."""
        if not self.has_latency or ranks <= 1:
            return 0.0
        where = "inside" if ranks <= self.gpus_inside else "outside"
        return figures_of(read(LATENCIES))[f"sum_{where}_us"].value * 1e-6


def _between(points: Sequence[tuple[float, float]], where: float) -> float:
    """A rate between two points, in proportion; beyond them that of the nearest."""
    below = [point for point in points if point[0] <= where]
    above = [point for point in points if point[0] > where]
    if not below or not above:
        return points[0][1] if not below else points[-1][1]
    (low, slow), (high, fast) = below[-1], above[0]
    share = math.log(where / low) / math.log(high / low)
    return slow * (fast / slow) ** share


def sets() -> tuple[str, ...]:
    return tuple(read(SETS))


def rates(gpu: Gpu, name: str = "stock") -> Rates:
    """Of a GPU, with the shares of a set of data/rates.json.

    Raises:
        ValueError: if there is no such set.
    """
    known = read(SETS)
    if name not in known:
        raise ValueError(f"rates: {name!r}, wanted one of {', '.join(known)}")
    raw = known[name]
    shares, machine = figures_of(raw["figures"]), gpu.figures
    value = {each: figure.value for each, figure in {**machine, **shares}.items()}
    memory = value["memory_tb_per_s"] * value["memory_share"]
    return Rates(
        name=name,
        about=raw["about"],
        memory_bytes_per_second=memory * 1e12,
        products_per_second={
            precision: ((1.0, value[f"{precision}_tflops"] * value["product_share"] * 1e12),)
            for precision in ("bf16", "fp8")
        },
        attention_per_second=value["attention_tflops"] * value["attention_share"] * 1e12,
        fp8_cache_speedup=value["fp8_cache_speedup"],
        inside_bytes_per_second=value["nvlink_gb_per_s"] * value["nvlink_share"] * 1e9,
        outside_bytes_per_second=value["all_to_all_gb_per_s"] * value["all_to_all_share"] * 1e9,
        gpus_inside=int(value["nvlink_gpus"]) if raw["counts_nvlink"] else 1,
        overlap_share=value["overlap_share"],
        layer_seconds=value["layer_overhead_us"] * 1e-6,
        has_latency=raw["counts_latency"],
        has_imbalance=raw["counts_imbalance"],
        reads_every_expert=raw["reads_every_expert"],
        splits_batches=raw["splits_batches"],
        omitted=frozenset(raw["omitted"]),
        figures=(*(machine[name] for name in USED), *(f for n, f in shares.items() if n != "operators_a_layer")),
        memory_bytes=gpu.memory_bytes,
    )


def operator_seconds() -> float:
    """Of an operator in a stock engine's graph, as the fixed cost of a layer is taken to be made of."""
    stock = figures_of(read(SETS)["stock"]["figures"])
    return stock["layer_overhead_us"].value * 1e-6 / stock["operators_a_layer"].value
