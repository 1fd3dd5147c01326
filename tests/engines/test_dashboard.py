"""A real Prometheus and a stock server of LongCat-Nano: every query of the example's dashboard, and `longcat top`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from typer.testing import CliRunner

from longcat_cli.commands import app
from longcat_core.observation.publication import INTERVAL_S
from longcat_nano import CHECKPOINT
from tests.harness import engine
from tests.prometheus import DASHBOARD, Prometheus, Query, needs_prometheus, queries, scraping
from tests.requests import COMPLETIONS, MODEL
from tests.server import Server, serving, wait_until

pytestmark = needs_prometheus
TOP_K, EXPERTS = 6, 32
DRAFT_TOKENS, NEW_TOKENS = 3, 48
PROMPTS = ("import os\n\n\ndef ", "class Node:\n    def __init__(self, value):\n", "    for name in sorted(")
OF_RANKS = "Busiest rank over the mean"
"""The panel that has nothing to show of one rank: `test_metrics.py` asks it of two."""
A_SCRAPE_S = 1
"""What one takes at most: no sample of a time before it is still to come."""
OF_A_DIAL = "{{instance}} target of the dial"
"""The line that is not there without one: `test_dial_server.py` asks for it."""
QUERIES = [query for query in queries(rate_interval="5m") if query.panel != OF_RANKS and query.legend != OF_A_DIAL]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [
        *engine.command(CHECKPOINT, served_name=MODEL),
        *engine.speculation_flags(DRAFT_TOKENS),
        *engine.GATED_FLAGS,
    ]
    with serving(command, tmp_path_factory.mktemp("served") / "server.log") as server:
        yield server


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It scrapes the server before, while and after that answers. A counter that begins with its first event is known
    to grow from its second one on."""
    with scraping(server, tmp_path_factory.mktemp("prometheus")) as prometheus:

        def is_all_answered_after_requests() -> bool:
            for prompt in PROMPTS:
                request = {"prompt": prompt, "temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
                server.http.post(COMPLETIONS, json={"model": MODEL, **request}).raise_for_status()
            time.sleep(INTERVAL_S)
            prometheus.moment = time.time() - A_SCRAPE_S
            return all(map(math.isfinite, (value(prometheus, query) for query in QUERIES)))

        with suppress(AssertionError):  # the tests say which are not
            wait_until(is_all_answered_after_requests, seconds=60)
        yield prometheus


def value(prometheus: Prometheus, query: Query) -> float:
    """The mean of a query's series, NaN if there are none."""
    points = [series.points[0][1] for series in prometheus.ask(query.expression)]
    return sum(points) / len(points) if points else math.nan


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.panel}: {query.legend}")
def test_every_query_of_the_dashboard_has_an_answer(query: Query, prometheus: Prometheus) -> None:
    found = prometheus.ask(query.expression)
    assert found
    assert all(math.isfinite(series.points[0][1]) for series in found)
    assert all(set(re.findall(r"{{(\w+)}}", query.legend)) <= series.labels.keys() for series in found)


def panel(prometheus: Prometheus, title: str, by: str) -> dict[str, float]:
    """What a panel shows, by a label."""
    (query,) = (query for query in QUERIES if query.panel == title)
    return {series.labels[by]: series.points[0][1] for series in prometheus.ask(query.expression)}


def test_the_panels_show_every_layer_and_position_and_agree(prometheus: Prometheus) -> None:
    (instance, mean), *others = panel(prometheus, "FFN experts a token, mean", "instance").items()
    assert not others
    by_layer = panel(prometheus, "FFN experts a token, by layer", "layer")
    assert by_layer.keys() == {"0", "1"}
    assert sum(by_layer.values()) / 2 == pytest.approx(mean)
    free = panel(prometheus, "Expert choices that were free", "instance")[instance]
    assert free == pytest.approx(1 - mean / TOP_K)
    buckets = panel(prometheus, "Tokens by their number of FFN experts", "le")
    assert buckets["+Inf"] == buckets[f"{TOP_K}.0"] == max(buckets.values()) > buckets["2.0"]
    assert 1 < panel(prometheus, "Busiest expert over the mean", "instance")[instance] < EXPERTS
    accepted = panel(prometheus, "Drafts accepted, by position", "position")
    assert accepted.keys() == {str(position) for position in range(DRAFT_TOKENS)}
    assert 1 > accepted["0"] > accepted["1"] > accepted["2"] > 0


def test_the_variables_of_the_dashboard_have_values(prometheus: Prometheus) -> None:
    found = {}
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]).groups()
            found[label] = prometheus.label_values(label, selector.replace("$model", ".*"))
    assert found == {"model_name": [MODEL], "layer": ["0", "1"]}


def test_longcat_top_shows_what_the_server_counted(server: Server, prometheus: Prometheus) -> None:
    shown = CliRunner().invoke(app, ["top", str(server.http.base_url)], env={"no_proxy": "127.0.0.1"})
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith(f"{MODEL} in {engine.NAME}; requests: 0 running, 0 waiting\n")
    rows = dict(re.findall(r"^ ?(.+?)  +([\d.,]+%?)(?=  )", shown.stdout, re.MULTILINE))
    taken, tokens = (server.metric(f"longcat:ffn_experts_per_token_{each}") for each in ("sum", "count"))
    assert rows["tokens generated"] == f"{server.metric(engine.METRICS.generated):,.0f}"
    assert rows["FFN experts a token, mean"] == f"{taken / tokens:.2f}"
    assert rows["drafts pruned"] == f"{server.metric(engine.METRICS.pruned):,.0f}"
    assert rows.keys() >= {f"drafts accepted, position {position}" for position in range(DRAFT_TOKENS)}
    assert 0 < float(rows["seconds to first token, mean"]) < 60
