"""Counts of expert choices, and what a dial is at, in a server's `/metrics`, from whatever process has them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.utils import floatToGoString

from longcat_core.dial import Dial
from longcat_core.observation.expert_choices import ExpertChoices, LayerTotals

INTERVAL_S = 2.0
"""Between two looks at the counts, so that `/metrics` is behind by as much."""
_GAUGE = "gauge_mostrecent"
"""One value, though stages of a pipeline each write it: the last that was written."""


class Metric(NamedTuple):
    name: str
    kind: str
    """As prometheus_client begins the name of its file."""
    help: str


EXPERTS_A_TOKEN = Metric(
    "longcat:ffn_experts_per_token", "histogram", "FFN experts that a token takes; its other choices are zero experts."
)
CHOICES = Metric("longcat:expert_choices", "counter", "Expert choices by kind, ffn or zero; those of zero are free.")
BUSIEST_EXPERT = Metric(
    "longcat:busiest_expert_tokens", "counter", "Tokens of the FFN expert that has most in its step, summed over steps."
)
MEAN_EXPERT = Metric("longcat:mean_expert_tokens", "counter", "Tokens of the mean FFN expert, summed over steps.")
BUSIEST_RANK = Metric(
    "longcat:busiest_rank_rows", "counter", "Rows of FFN experts on the rank that has most in its step, over steps."
)
MEAN_RANK = Metric("longcat:mean_rank_rows", "counter", "Rows of FFN experts on the mean rank, summed over steps.")
TARGET = Metric("longcat:ffn_experts_target", _GAUGE, "FFN experts a token at which the dial holds every layer's mean.")
BIAS = Metric("longcat:zero_expert_bias", _GAUGE, "Bias of a layer's zero experts, as the dial has set it.")


class Sample(NamedTuple):
    """One number of a layer's, or of all layers'."""

    metric: Metric
    name: str
    labels: tuple[tuple[str, str], ...]
    """Beside those that all numbers have, and the layer's."""
    value: float


def samples(totals: LayerTotals, n_routed_experts: int, ranks: int) -> list[Sample]:
    """What `/metrics` shows of a layer; of ranks only where experts are spread over several."""
    bounds = [*(floatToGoString(number) for number in range(len(totals.tokens))), "+Inf"]
    histogram = [
        Sample(EXPERTS_A_TOKEN, f"{EXPERTS_A_TOKEN.name}_bucket", (("le", bound),), tokens)
        for bound, tokens in zip(bounds, (*totals.tokens, 0), strict=True)  # not yet accumulated in a file
    ]
    counters: list[tuple[Metric, tuple[tuple[str, str], ...], float]] = [
        (CHOICES, (("kind", "ffn"),), totals.ffn_choices),
        (CHOICES, (("kind", "zero"),), totals.zero_choices),
        (BUSIEST_EXPERT, (), totals.busiest_expert),
        (MEAN_EXPERT, (), totals.ffn_choices / n_routed_experts),
    ]
    if ranks > 1:
        counters += [(BUSIEST_RANK, (), totals.busiest_rank), (MEAN_RANK, (), totals.ffn_choices / ranks)]
    return [
        *histogram,
        Sample(EXPERTS_A_TOKEN, f"{EXPERTS_A_TOKEN.name}_sum", (), totals.ffn_choices),
        *(Sample(metric, f"{metric.name}_total", labels, value) for metric, labels, value in counters),
    ]


class Publication:
    """Shows the choices of a process in files of a directory that its server's `/metrics` reads: the format in which
    prometheus_client lets the processes of a server share metrics, and which has no way to add many at once."""

    def __init__(
        self, choices: ExpertChoices, directory: Path, labels: Mapping[str, str], dial: Dial | None = None
    ) -> None:
        """labels: of all that is shown, beside the layer's; dial: of the layers whose choices these are, if any."""
        self._choices, self._labels, self._dial = choices, labels, dial
        kinds = ("histogram", "counter") if dial is None else ("histogram", "counter", _GAUGE)
        self._files = {kind: MmapedDict(str(directory / f"{kind}_longcat-choices-{os.getpid()}.db")) for kind in kinds}
        self._shown: tuple[list[LayerTotals], float | None, list[float]] | None = None
        self.show()

    def begin(self) -> None:
        """Show the counts from time to time, in a thread that ends with the process. On a GPU not before all graphs are
        captured, as copies from the device disturb a capture."""
        Thread(target=self._show_again_and_again, name="longcat-metrics", daemon=True).start()

    def show(self) -> None:
        target, biases = (None, list[float]()) if self._dial is None else (self._dial.target, self._dial.biases())
        totals = self._choices.totals()
        if (totals, target, biases) == self._shown:
            return
        for layer, of_layer in zip(self._choices.layers, totals, strict=True):
            for sample in samples(of_layer, self._choices.n_routed_experts, self._choices.ranks):
                self._write(sample, layer=str(layer))
        if target is not None:
            self._write(Sample(TARGET, TARGET.name, (), target))
            for layer, bias in zip(self._choices.layers, biases, strict=True):
                self._write(Sample(BIAS, BIAS.name, (), bias), layer=str(layer))
        self._shown = totals, target, biases

    def _write(self, sample: Sample, **layer: str) -> None:
        labels = {**self._labels, **layer, **dict(sample.labels)}
        key = mmap_key(sample.metric.name, sample.name, [*labels], [*labels.values()], sample.metric.help)
        self._files[sample.metric.kind].write_value(key, sample.value, time.time())

    def _show_again_and_again(self) -> None:
        while True:
            time.sleep(INTERVAL_S)
            self.show()
