"""The MoE layer after its router: our kernels, and vLLM's Triton with slots dropped and with all computed."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.gpu.cases import Case, Context, Row, rows
from benchmarks.gpu.checks import LIMITS, check, truth
from benchmarks.gpu.inputs import Batch, cost, random_batch, random_weights
from benchmarks.gpu.our_kernels import OurMoE
from benchmarks.gpu.sizes import Deployment
from benchmarks.gpu.vllm_kernels import TritonMoE
from longcat_core.kernels.experts import ExpertWeights

KERNELS = ("ours", "vLLM, dropped", "vLLM, remapped", "ours, remapped")
"""Dropped: a choice of a zero expert has no row. Remapped: it is one of some FFN expert, with the weight 0."""


@dataclass(frozen=True)
class Setting:
    precision: str
    deployment: Deployment
    routing: str


def settings(context: Context) -> Iterator[Setting]:
    """The most valuable first."""
    sizes = context.sizes
    for routing, deployments in (("random", sizes.deployments[:2]), ("skewed", sizes.skewed)):
        for precision in sizes.precisions:
            for deployment in deployments:
                yield Setting(precision, deployment, routing)
    for deployment in sizes.deployments[2:]:
        for precision in sizes.precisions:
            yield Setting(precision, deployment, "random")


def stage(context: Context) -> Iterator[Row]:
    for setting in settings(context):
        weights: list[ExpertWeights] = []  # made when the first case is run, freed with the last
        for tokens in context.sizes.tokens:
            yield from rows(_Cases(context, setting, tokens, weights), context)


class _Cases:
    """The kernels over one batch, and the same batch with zero experts remapped."""

    def __init__(self, context: Context, setting: Setting, tokens: int, weights: list[ExpertWeights]) -> None:
        self._context, self._setting, self._tokens, self._weights = context, setting, tokens, weights
        self._made: dict[bool, tuple[Batch, Tensor]] = {}

    def __iter__(self) -> Iterator[Case]:
        for kernel in KERNELS:
            fields = {
                "precision": self._setting.precision,
                "deployment": self._setting.deployment.name,
                "local_experts": self._setting.deployment.local_experts,
                "routing": self._setting.routing,
                "tokens": self._tokens,
                "kernel": kernel,
            }
            yield Case(fields, partial(self._run, kernel))

    def _run(self, kernel: str) -> dict[str, Any]:
        context, precision = self._context, self._setting.precision
        config = context.sizes.config
        if not self._weights:
            local = self._setting.deployment.local_experts
            self._weights.append(random_weights(config, local, precision, context.device))
        weights = self._weights[0]
        batch, wanted = self._batch(kernel.endswith("remapped"))
        call: Callable[[], Tensor]
        if kernel.startswith("ours"):
            call = partial(OurMoE(weights, context.device_name, context.sizes.is_compiled), batch)
        else:
            call = partial(TritonMoE(config, weights, context.sizes.is_compiled), batch)
        error = check(call(), wanted, LIMITS[precision])
        return {**asdict(context.timer(call)), "worst_token_error": error, **asdict(cost(batch, weights))}

    def _batch(self, is_remapped: bool) -> tuple[Batch, Tensor]:
        if is_remapped not in self._made:
            self._made.clear()  # the other one's truth takes memory
            setting, context = self._setting, self._context
            made = random_batch(
                context.sizes.config, setting.deployment, self._tokens, setting.routing, is_remapped, context.device
            )
            self._made[is_remapped] = made, truth(made, self._weights[0])
        return self._made[is_remapped]
