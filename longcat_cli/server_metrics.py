"""What a server's `/metrics` show, of LongCat's and its engine's own, whichever it is; what grew between readings."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit, urlunsplit

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 10
EXPERTS_A_TOKEN = "longcat:ffn_experts_per_token"
CHOICES = "longcat:expert_choices_total"
BUSIEST_EXPERT, MEAN_EXPERT = "longcat:busiest_expert_tokens_total", "longcat:mean_expert_tokens_total"
BUSIEST_RANK, MEAN_RANK = "longcat:busiest_rank_rows_total", "longcat:mean_rank_rows_total"
TARGET = "longcat:ffn_experts_target"


class Names(NamedTuple):
    """Under which an engine shows what both engines show."""

    engine: str
    running: str
    waiting: str
    generated: str
    """Output tokens, counted while they come."""
    generated_labels: Mapping[str, str]
    first_token: str
    """Histogram of seconds from a request to its first token."""
    pruned: str
    """Drafts that a gate kept from verification."""
    accepted: str
    """Drafts that were accepted, by position."""
    chains: str
    """Of drafts, that were verified."""


ENGINES = {
    "vllm": Names(
        "vLLM",
        running="vllm:num_requests_running",
        waiting="vllm:num_requests_waiting",
        generated="vllm:generation_tokens_total",
        generated_labels={},
        first_token="vllm:time_to_first_token_seconds",
        pruned="vllm:spec_decode_num_draft_tokens_pruned_total",
        accepted="vllm:spec_decode_num_accepted_tokens_per_pos_total",
        chains="vllm:spec_decode_num_drafts_total",
    ),
    "sglang": Names(
        "SGLang",
        running="sglang:num_running_reqs",
        waiting="sglang:num_queue_reqs",
        generated="sglang:realtime_tokens_total",
        generated_labels={"mode": "decode"},
        first_token="sglang:time_to_first_token_seconds",
        pruned="sglang:spec_num_drafts_pruned_total",
        accepted="longcat:accepted_drafts_total",
        chains="longcat:verified_chains_total",
    ),
}
"""By what the names of an engine's metrics begin with."""
Key = tuple[str, frozenset[tuple[str, str]]]
"""A sample's name and its labels."""


class MetricsError(RuntimeError):
    """A server that shows no metrics of LongCat's; the message says what was found, and what is wanted."""


@dataclass(frozen=True)
class Samples:
    """Of one time, or by how much counters grew from one time to another."""

    values: Mapping[Key, float]

    def sum(self, name: str, **labels: str) -> float:
        """Of the samples of this name with these labels; one that lacks a label has it empty, as Prometheus has it."""
        return sum(
            value
            for (each, found), value in self.values.items()
            if each == name and labels.items() <= {**dict.fromkeys(labels, ""), **dict(found)}.items()
        )

    def sums(self, name: str, by: str, **labels: str) -> dict[str, float]:
        """The same for each value of the label `by`, in order of numbers."""
        found = defaultdict[str, float](float)
        for (each, pairs), value in self.values.items():
            here = dict(pairs)
            if each == name and labels.items() <= here.items():
                found[here[by]] += value
        return dict(sorted(found.items(), key=lambda item: float(item[0])))

    def has(self, name: str) -> bool:
        return any(each == name for each, _ in self.values)


@dataclass(frozen=True)
class Reading:
    """What a server showed when it was asked."""

    names: Names
    model: str
    seconds: float
    """When, by a clock that only goes forwards."""
    samples: Samples

    def since(self, before: Reading) -> Samples:
        """By how much counters grew. One that is less than it was began again at 0, as its server did. What gauges do
        has no meaning."""
        grown = {}
        for key, value in self.samples.values.items():
            earlier = before.samples.values.get(key, 0.0)
            grown[key] = value - earlier if value >= earlier else value
        return Samples(grown)


def metrics_url(url: str) -> str:
    """Where a server shows its metrics: `/metrics` below its own address, `http://` if that is left out.

    Raises:
        MetricsError: for what is no address of a server.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise MetricsError(f"{url}: no address of a server, wanted one like http://localhost:8000")
    path = parts.path.rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc, path if path.endswith("/metrics") else f"{path}/metrics", "", ""))


def read(url: str) -> Reading:
    """Ask for the metrics at `url`.

    Raises:
        MetricsError: if nobody answers there, or no metrics of LongCat's are among the answer.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            text = response.read().decode(errors="replace")
        at = time.monotonic()
        families = list(text_string_to_metric_families(text))
    except HTTPError as error:
        hint = "SGLang shows its metrics with --enable-metrics" if error.code == 404 else "the server's log says why"
        raise MetricsError(f"{url}: status {error.code}; {hint}") from None
    except (OSError, HTTPException) as error:
        raise MetricsError(f"{url}: cannot be reached: {getattr(error, 'reason', error)}") from None
    except ValueError:
        raise MetricsError(f"{url}: what is there are no metrics") from None
    found = [sample for family in families for sample in family.samples]
    samples = Samples({(each.name, frozenset(each.labels.items())): each.value for each in found})
    names = next((ENGINES[prefix] for each in found if (prefix := each.name.partition(":")[0]) in ENGINES), None)
    if names is None:
        raise MetricsError(f"{url}: no metrics of vLLM or SGLang")
    model = next((each.labels["model_name"] for each in found if each.name == f"{EXPERTS_A_TOKEN}_count"), None)
    if model is None:
        raise MetricsError(
            f"{url}: metrics of {names.engine}, and none of LongCat's ({EXPERTS_A_TOKEN}): it serves no LongCat-Flash "
            "with this plugin, or counts nothing with its options; docs/observability.md has those"
        )
    return Reading(names, model, at, samples)
