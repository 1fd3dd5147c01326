"""A deployment, what it can hold, and what it is expected to do with so many requests at once."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass, replace

from longcat_core.planning.costs import Load
from longcat_core.planning.drafts import GATE_KEEPS, Drafts
from longcat_core.planning.dry_run import Report
from longcat_core.planning.figures import PRICE_MONTHS, Figure
from longcat_core.planning.layout import Layout, Precision
from longcat_core.planning.memory import KEPT_BYTES, SHARE, Memory, memory
from longcat_core.planning.models import Model
from longcat_core.planning.price import dollars_a_million_tokens
from longcat_core.planning.rates import Rates, operator_seconds
from longcat_core.planning.step import StepTime, schedule, step_time

NO_DRAFTS = Drafts()
MOST_REQUESTS = 1 << 16
"""In a replica, that are looked at."""


@dataclass(frozen=True)
class Deployment:
    """A model on a machine; batches and contexts are of decode, prefill is not in it."""

    model: Model
    machine: str
    rates: Rates
    layout: Layout
    precision: Precision
    context: int
    """Cached tokens of a request, on average while it is decoded."""
    overlap: str = "none"
    drafts: Drafts = NO_DRAFTS
    ffn_experts: float | None = None
    """A token's, in each layer; None for the mean that training holds."""
    imbalance: float | None = None
    share: float = SHARE
    kept_bytes: float = KEPT_BYTES
    dollars_an_hour: Figure | None = None
    allocated_bytes: float | None = None
    """For weights on one GPU, by an engine in a dry run; None if they are computed."""

    def problems(self) -> Iterator[str]:
        """Why it cannot be planned."""
        yield from self.layout.problems(self.model)
        if self.layout.dp > 1 and self.layout.ep == 1:
            yield "ep: 1 beside dp is not modelled; leave --ep out"
        if self.drafts.count and not self.model.has_mtp:
            yield f"drafts: {self.model.name} is planned without an MTP layer"
        try:
            schedule(self.model, self.overlap)
        except ValueError as error:
            yield str(error)

    @property
    def memory(self) -> Memory:
        drafts = self.drafts.count > 0
        return memory(
            self.model,
            self.layout,
            self.precision,
            self.rates.memory_bytes,
            share=self.share,
            kept_bytes=self.kept_bytes,
            with_mtp=drafts,
            with_mtp_cache=drafts,
            allocated_bytes=self.allocated_bytes,
        )

    @property
    def requests_that_fit(self) -> int:
        """In one replica."""
        return self.memory.tokens_a_replica // self.context

    def load(self, requests: float) -> Load:
        experts = self.model.ffn_experts_a_token if self.ffn_experts is None else self.ffn_experts
        return Load(requests, requests * self.drafts.rows, self.context, experts, self.imbalance)

    def step(self, requests: float) -> StepTime:
        """requests: of one replica."""
        args = (self.model, self.layout, self.precision, self.rates, self.overlap)
        return step_time(*args, self.load(requests), self.drafts.count)

    def at(self, requests: float) -> Plan:
        return Plan(self, requests, self.step(requests))


@dataclass(frozen=True)
class Share:
    """Of a step's time, what one operation of the longest track of its stage takes."""

    operation: str
    bound: str
    share: float


@dataclass(frozen=True)
class Plan:
    deployment: Deployment
    requests: float
    """Of one replica."""
    step: StepTime

    @property
    def seconds_a_token(self) -> float:
        """Of one request."""
        return self.step.seconds / self.deployment.drafts.tokens_a_step

    @property
    def tokens_per_second_a_user(self) -> float:
        return 1 / self.seconds_a_token

    @property
    def tokens_per_second_a_gpu(self) -> float:
        return self.requests * self.tokens_per_second_a_user / self.deployment.layout.tp

    @property
    def dollars_a_million_tokens(self) -> float | None:
        price = self.deployment.dollars_an_hour
        return None if price is None else dollars_a_million_tokens(price.value, self.tokens_per_second_a_gpu)

    @property
    def fits(self) -> bool:
        return self.missing_bytes == 0

    @property
    def missing_bytes(self) -> float:
        """On each GPU."""
        return self.deployment.memory.missing_bytes(self.requests * self.deployment.context)

    def bottlenecks(self) -> list[Share]:
        """Shares of a step, the largest first: operations on the longest track of their stage, what is around them."""
        step, found = self.step, []
        for stage in step.stages:
            track = max(stage.tracks, key=lambda track: sum(each.seconds for each in track))
            of_layers = step.layers * stage.seconds / max(sum(each.seconds for each in track), 1e-30)
            found += [Share(each.name, each.bound, of_layers * each.seconds / step.seconds) for each in track]
        fixed = step.layers * step.overhead_seconds / step.seconds
        found.append(Share("launches and gaps", "latency", fixed))
        found.append(Share("engine, outside of the layers", "latency", step.engine_seconds / step.seconds))
        around = (step.head_seconds + step.mtp_seconds + step.dense_layer_seconds) / step.seconds
        found.append(Share("output head, drafts, dense layers", "bytes", around))
        return sorted((each for each in found if each.share > 0), key=lambda each: -each.share)


@dataclass(frozen=True)
class Choice:
    """How many requests at once, and what stops there being more (or fewer)."""

    plan: Plan
    by_time: float | None
    """Requests of a replica that the goal allows; None if there is no goal."""
    by_memory: int
    bound: str
    """"memory", "time" or "given"."""


class GoalError(ValueError):
    """A goal that cannot be reached; the message says how far it goes."""


def for_users(deployment: Deployment, tokens_per_second: float) -> Choice:
    """As many requests as can each have so many tokens a second, and fit.

    Raises:
        GoalError: if not even one can.
    """

    def is_fast(requests: int) -> bool:
        return deployment.at(requests).tokens_per_second_a_user >= tokens_per_second

    if not is_fast(1):
        reached = deployment.at(1).tokens_per_second_a_user
        raise GoalError(f"{tokens_per_second:g} tokens/s a user: one request alone has {reached:.1f}")
    low, high = 1, MOST_REQUESTS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_fast(middle) else (low, middle - 1)
    fit = deployment.requests_that_fit
    return Choice(deployment.at(max(1, min(low, fit))), low, fit, "time" if low <= fit else "memory")


def for_dollars(deployment: Deployment, dollars: float) -> Choice:
    """As few requests, so as many tokens a second for each, as a million tokens at no more than this price allow.

    Raises:
        GoalError: if memory ends before the price is low enough, or there is no price.
    """
    if deployment.dollars_an_hour is None:
        raise GoalError("no price is known for this machine; give one with --price")
    fit = deployment.requests_that_fit
    if fit < 1:
        return Choice(deployment.at(1), None, fit, "memory")

    def is_cheap(requests: int) -> bool:
        return (deployment.at(requests).dollars_a_million_tokens or 0.0) <= dollars

    if not is_cheap(fit):
        reached = deployment.at(fit).dollars_a_million_tokens
        raise GoalError(
            f"{dollars} dollars a million tokens: with all {fit} requests that fit in a replica it is {reached:.2f}"
        )
    low, high = 1, fit
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_cheap(middle) else (middle + 1, high)
    return Choice(deployment.at(low), low, fit, "time")


def all_that_fit(deployment: Deployment) -> Choice:
    fit = deployment.requests_that_fit
    return Choice(deployment.at(max(1, fit)), None, fit, "memory")


def given(deployment: Deployment, requests: float) -> Choice:
    return Choice(deployment.at(requests), None, deployment.requests_that_fit, "given")


def with_dry_run(deployment: Deployment, report: Report) -> Deployment:
    """With the weights, the activations and the launches of a layer that an engine's dry run has found.

    Raises:
        ValueError: if the dry run ended before it had them.
    """
    steps = [step for step in report.steps if step.name == "decode"]
    if report.memory is None or not steps:
        raise ValueError("dry run: it has no memory or no step of decode; see what it says with longcat dry-run")
    launches = sum(steps[0].in_layer(1).values())
    memory = report.memory
    return replace(
        deployment,
        rates=replace(deployment.rates, layer_seconds=launches * operator_seconds()),
        share=memory.requested / memory.total,
        kept_bytes=memory.activations,
        allocated_bytes=memory.weights,
    )


def assumptions(deployment: Deployment, today: datetime.date) -> list[Figure]:
    """All figures that a plan rests on."""

    def of(name: str, value: float, unit: str, kind: str, source: str) -> Figure:
        return Figure(name, value, unit, kind, source, today)

    unused = _unused(deployment)
    found = [figure for figure in deployment.rates.figures if figure.name not in unused]
    if deployment.dollars_an_hour is not None:
        found.append(deployment.dollars_an_hour)
    found.append(
        of("gpu_memory_share", deployment.share, "of a GPU's memory", "assumed", "--share; vLLM's default is 0.92")
    )
    kept = "--kept-gb; aiconfigurator takes 3.9 GiB, SGLang 0.5.21 at least 10 GiB"
    found.append(of("kept_gb", deployment.kept_bytes / 1e9, "GB", "assumed", kept))
    experts = deployment.load(1).ffn_experts
    how = "the mean that training holds: the share of FFN experts among all"
    how = how if deployment.ffn_experts is None else "--ffn-experts"
    found.append(of("ffn_experts_a_token", experts, "FFN experts in each layer", "assumed", how))
    if deployment.drafts.count:
        kind = "given with --acceptance"
        found.append(of("acceptance", deployment.drafts.acceptance, "of drafts", "assumed", kind))
    if deployment.drafts.has_gate:
        gate = "arXiv 2502.13652: C2T on a chain, MTP layer, threshold 0.8"
        found.append(of("gate_keeps", GATE_KEEPS, "of drafts", "measured", gate))
    if deployment.rates.has_imbalance and deployment.layout.ep > 1:
        how = "random routing: 1 + sqrt(2 ln ranks / rows of a rank)" if deployment.imbalance is None else "--routing"
        value = deployment.imbalance or 0.0
        name = "busiest_rank_over_mean"
        found.append(of(name, value, "(0: by the batch)" if not value else "", "computed", how))
    return found


def _unused(deployment: Deployment) -> set[str]:
    """Figures of the machine and the rates that play no part in this deployment."""
    layout, speed = deployment.layout, deployment.rates
    found = set()
    if layout.gpus <= speed.gpus_inside or layout.gpus == 1:
        found |= {"all_to_all_gb_per_s", "all_to_all_share", "nic_gb_per_s"}
    if layout.gpus == 1 or speed.gpus_inside == 1:
        found |= {"nvlink_gb_per_s", "nvlink_share"}
    if deployment.overlap == "none":
        found.add("overlap_share")
    if deployment.precision.cache == "bf16":
        found.add("fp8_cache_speedup")
    return found


def notes(deployment: Deployment, today: datetime.date) -> Iterator[str]:
    """What a reader has to know beside the numbers."""
    if deployment.model.remark:
        yield deployment.model.remark
    price = deployment.dollars_an_hour
    if price is None:
        yield f"no price: none was found for {deployment.machine}; give one with --price"
    elif price.months(today) > PRICE_MONTHS:
        yield f"the price is {price.months(today)} months old, of {price.date}"
    redundant = deployment.layout.redundant_experts(deployment.model)
    if redundant:
        yield (
            f"{deployment.layout.ep} ranks do not divide {deployment.model.experts} experts: "
            f"{redundant} redundant copies fill the last slots"
        )
    if unverified := [each.name for each in assumptions(deployment, today) if each.is_unverified]:
        yield f"unverified, so take what rests on it with care: {', '.join(unverified)}"
    if deployment.allocated_bytes is not None:
        yield "weights, activations and launches of a layer are a dry run's"
    yield "decode only: prefill, its share of the time and its effect on waiting requests are not in these numbers"
    if deployment.rates.name != "calibrated":
        yield "computed: no LongCat model has been measured with this plugin on a GPU"
