"""What each operation of a decode step reads, computes and sends on one GPU, and so how long it takes and why."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from longcat_core.planning.imbalance import random_imbalance
from longcat_core.planning.layout import BYTES, Layout, Precision
from longcat_core.planning.memory import ROUTER_BYTES
from longcat_core.planning.models import Model
from longcat_core.planning.rates import Rates

ACTIVATION_BYTES = 2
"""Of a value between layers."""


@dataclass(frozen=True)
class Load:
    """What one replica of the attention computes in a step; averages may be fractions."""

    requests: float
    rows: float
    """Tokens, drafts included."""
    context: float
    """Cached tokens of a request."""
    ffn_experts: float
    """Chosen by a token, of all it chooses: the others are zero experts."""
    imbalance: float | None = None
    """Busiest rank over the mean; None for that of random routing."""

    def half(self) -> Load:
        return replace(self, requests=self.requests / 2, rows=self.rows / 2)


@dataclass(frozen=True)
class Cost:
    """Of one operation, on one GPU. Bytes that are sent go one way."""

    memory_bytes: float = 0.0
    product_operations: float = 0.0
    """Multiplications and additions."""
    precision: str = "bf16"
    rows: float = 1.0
    """Of the product's activations."""
    attention_operations: float = 0.0
    context: float = 1.0
    """Cached tokens that attention is over."""
    nvlink_bytes: float = 0.0
    network_bytes: float = 0.0
    latency_seconds: float = 0.0


@dataclass(frozen=True)
class Timed:
    """An operation's time: that of its slowest resource."""

    name: str
    cost: Cost
    seconds: float
    bound: str
    """"bytes", "operations", "NVLink", "network" or "latency"."""


def timed(name: str, cost: Cost, rates: Rates) -> Timed:
    """A roofline: an operation takes as long as its slowest resource, after its latency."""
    operations = cost.product_operations / rates.products(cost.precision, max(1.0, cost.rows))
    parts = {
        "bytes": cost.memory_bytes / rates.memory_bytes_per_second,
        "operations": operations + cost.attention_operations / rates.attention(cost.context),
        "NVLink": cost.nvlink_bytes / rates.inside_bytes_per_second,
        "network": cost.network_bytes / rates.outside_bytes_per_second,
    }
    bound = max(parts, key=parts.__getitem__)
    seconds = parts[bound]
    if cost.latency_seconds > seconds:
        bound = "latency"
    return Timed(name, cost, seconds + cost.latency_seconds, bound)


def layer_costs(model: Model, layout: Layout, precision: Precision, rates: Rates, load: Load) -> dict[str, Cost]:
    """Of a layer with experts, by the names of `parallel.schedule`; what a deployment does not have is not there.

    Sources: the report's Table 7, from whose numbers the formulas are inferred (docs/plan.md); bytes and operations of
    MLA as FlashMLA's deep dive has them; payloads as DeepEP's README.
    """
    found: dict[str, Cost] = {}
    for n in range(model.attentions_a_layer):
        for part, cost in _attention(model, layout, precision, rates, load).items():
            found[f"attention_{n}_{part}"] = cost
    for n in range(model.dense_ffns_a_layer):
        found[f"dense_ffn_{n}"] = _linear(model.ffn_parameters / layout.tp, precision.dense_ffns, load.rows)
    found["router"] = Cost(
        memory_bytes=model.router_parameters * ROUTER_BYTES,
        product_operations=2 * model.router_parameters * load.rows,
        rows=load.rows,
    )
    if model.zero_experts:
        # Reads the tokens and adds them to the output; ranks with the same tokens share them.
        values = load.rows / layout.tp * model.hidden_size
        found["identity"] = Cost(memory_bytes=2 * values * ACTIVATION_BYTES)
    imbalance = _imbalance(layout, rates, load)
    found["experts"] = _experts(model, layout, precision, rates, load, imbalance)
    if layout.ep > 1 and layout.dp > 1:
        copies = load.rows / layout.tp * load.ffn_experts * imbalance
        sent = copies * model.hidden_size
        # An engine sends FP8 to experts in FP8, without counting its scales; what comes back is in bf16.
        out = sent * (1 if precision.experts == "fp8" else ACTIVATION_BYTES)
        for way, size in (("dispatch", out), ("combine", sent * ACTIVATION_BYTES)):
            nvlink, network = _all_to_all(size, layout.ep, rates)
            latency = rates.all_to_all_seconds(way, layout.ep)
            found[way] = Cost(nvlink_bytes=nvlink, network_bytes=network, latency_seconds=latency)
    if layout.tp > 1:
        sums = [f"attention_{n}_sum" for n in range(model.attentions_a_layer)]
        if model.is_shortcut:
            sums.append("dense_ffn_0_sum")
        for name in (*sums, "final_sum"):
            found[name] = _sum(model, layout, rates, load)
    return {name: cost for name, cost in found.items() if name not in rates.omitted}


def dense_layer_costs(model: Model, layout: Layout, precision: Precision, rates: Rates, load: Load) -> dict[str, Cost]:
    """Of a layer with one attention and one dense FFN. A set of rates leaves sums out of it, and nothing else: what the
    report's theory hides under the all-to-all of other layers takes its time here."""
    found = {f"attention_0_{n}": cost for n, cost in _attention(model, layout, precision, rates, load).items()}
    found["dense_ffn_0"] = _linear(model.ffn_parameters / layout.tp, precision.dense_ffns, load.rows)
    if layout.tp > 1:
        for name in ("attention_0_sum", "dense_ffn_0_sum"):
            if name not in rates.omitted:
                found[name] = _sum(model, layout, rates, load)
    return found


def mtp_costs(model: Model, layout: Layout, precision: Precision, rates: Rates, load: Load) -> Mapping[str, Cost]:
    """Of one draft: the MTP layer, with the projection of its two inputs, and the output head."""
    of_mtp = replace(precision, attention=precision.mtp, dense_ffns=precision.mtp)
    found = dense_layer_costs(model, layout, of_mtp, rates, load)
    found["input_projection"] = _linear(2 * model.hidden_size**2, precision.mtp, load.rows)
    found["head"] = head_cost(model, layout, load)
    return found


def head_cost(model: Model, layout: Layout, load: Load) -> Cost:
    return _linear(model.vocab_size * model.hidden_size / layout.tp, "bf16", load.rows)


def _linear(parameters: float, precision: str, rows: float) -> Cost:
    """A product with weights that are read once; activations are taken to stay in the cache."""
    return Cost(parameters * BYTES[precision], 2 * parameters * rows, precision, rows)


def _attention(model: Model, layout: Layout, precision: Precision, rates: Rates, load: Load) -> dict[str, Cost]:
    attention, hidden, tp = model.attention, model.hidden_size, layout.tp
    replicated = attention.replicated_parameters(hidden)
    cached = attention.cached_bytes(precision.cache) / (tp if attention.is_cache_split() else 1)
    speedup = 1.0 if precision.cache == "bf16" else rates.fp8_cache_speedup
    pairs = load.rows * load.context
    core = Cost(
        memory_bytes=load.requests * load.context * cached,
        attention_operations=pairs * attention.operations_a_pair() / tp / speedup,
        context=load.context,
    )
    return {
        "qkv": _linear(replicated + attention.query_parameters(hidden) / tp, precision.attention, load.rows),
        "core": core,
        "output": _linear(attention.output_parameters(hidden) / tp, precision.attention, load.rows),
    }


def _imbalance(layout: Layout, rates: Rates, load: Load) -> float:
    if not rates.has_imbalance or layout.ep == 1:
        return 1.0
    if load.imbalance is not None:
        return load.imbalance
    return random_imbalance(layout.ep, load.rows * layout.dp * load.ffn_experts / layout.ep)


def _experts(model: Model, layout: Layout, precision: Precision, rates: Rates, load: Load, imbalance: float) -> Cost:
    tokens = load.rows * layout.dp
    untouched = 0.0 if rates.reads_every_expert else (1 - load.ffn_experts / model.experts) ** tokens
    touched = model.experts * (1 - untouched)
    read = layout.experts_a_rank(model) * (1 - untouched) + model.shared_experts
    rows = tokens * load.ffn_experts / layout.gpus * imbalance + model.shared_experts * load.rows / layout.tp
    return Cost(
        memory_bytes=read * model.expert_parameters * BYTES[precision.experts],
        product_operations=2 * model.expert_parameters * rows,
        precision=precision.experts,
        rows=tokens * load.ffn_experts / touched if touched else 0.0,
    )


def _all_to_all(size: float, ranks: int, rates: Rates) -> tuple[float, float]:
    """Bytes over NVLink and over the network: every rank is as likely a target as any other."""
    near = min(rates.gpus_inside, ranks)
    if rates.gpus_inside <= 1:
        return 0.0, size
    return size * (near - 1) / ranks, size * (ranks - near) / ranks


def _sum(model: Model, layout: Layout, rates: Rates, load: Load) -> Cost:
    """A ring over the ranks of a replica: what each sends; between nodes each GPU of a node sends its share."""
    size, ranks = load.rows * model.hidden_size * ACTIVATION_BYTES, layout.tp
    near = min(ranks, max(1, rates.gpus_inside))
    nodes = ranks / near
    return Cost(
        nvlink_bytes=2 * size * (near - 1) / near,
        network_bytes=2 * size * (nodes - 1) / nodes / near,
        latency_seconds=rates.sum_seconds(ranks),
    )
