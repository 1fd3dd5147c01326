"""The dial of a stock server of LongCat-Nano: `/metrics` say where it is, and the engine's own route turns it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from longcat_core.observation.publication import INTERVAL_S
from longcat_nano import CHECKPOINT
from tests.harness import engine
from tests.prometheus import needs_prometheus, queries, scraping
from tests.requests import CHAT, COMPLETIONS, MODEL
from tests.server import Server, serving, wait_until

TARGET, BIAS, TAKEN = "longcat:ffn_experts_target", "longcat:zero_expert_bias", "longcat:ffn_experts_per_token"
LOWER, LOWEST = 2.5, 1.5
TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
AT_ONCE, NEW_TOKENS = 16, 96


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Of two ranks, which have one dial; and in vLLM with two servers of the API. Nothing waits with `load`."""
    command = [*engine.command(CHECKPOINT, served_name=MODEL, cache_tokens=8192), *engine.expert_parallel_flags(2)]
    command += [engine.MOST_RUNNING, str(AT_ONCE), *engine.dial_flags([LOWEST, LOWER], full_queue=AT_ONCE // 2)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (engine.ADMIN_ENVIRONMENT | engine.environment_of_ranks(2)).items():
            patch.setenv(name, value)
        log = tmp_path_factory.mktemp("dialled") / "server.log"
        with serving(command, log) as server:
            yield server


def tokens_of_layers(server: Server) -> list[tuple[float, float]]:
    """Tokens, and the FFN experts that they took, in each layer."""
    labels = [f'{{layer="{layer}"}}' for layer in range(2)]
    return [(server.metric(f"{TAKEN}_count{label}"), server.metric(f"{TAKEN}_sum{label}")) for label in labels]


def biases(server: Server) -> list[float]:
    return [server.metric(f'{BIAS}{{layer="{layer}"}}') for layer in range(2)]


def load(server: Server, rounds: int, at_once: int = AT_ONCE, new_tokens: int = NEW_TOKENS) -> set[float]:
    """So many times so many requests at once; the targets that their answers name."""

    def ask(start: int) -> float:
        request = {"model": MODEL, "prompt": TEXT[start : start + 64], "max_tokens": new_tokens, "ignore_eos": True}
        answer = server.http.post(COMPLETIONS, json={**request, "temperature": 0.8, "seed": start})
        return engine.target_of(answer.raise_for_status().json())

    with ThreadPoolExecutor(at_once) as pool:
        return set(pool.map(ask, range(0, 100 * at_once * rounds, 100)))


def means_of(server: Server, rounds: int) -> list[float]:
    """FFN experts a token in each layer, of what is loaded now."""
    before = tokens_of_layers(server)
    load(server, rounds)
    time.sleep(2 * INTERVAL_S)
    after = tokens_of_layers(server)
    return [(taken - was) / (tokens - had) for (tokens, taken), (had, was) in zip(after, before, strict=True)]


def test_the_mean_comes_to_the_target_that_metrics_show(server: Server) -> None:
    assert server.metric(TARGET) == LOWER
    assert min(means_of(server, rounds=1)) > LOWER + 0.3, "it begins with the model as published, which takes 4"
    assert load(server, rounds=8) == {LOWER}, "answers name it"
    assert means_of(server, rounds=4) == pytest.approx([LOWER] * 2, rel=0.06)
    assert min(biases(server)) > 0


STREAMS: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": MODEL, "prompt": TEXT[:64], "max_tokens": 4},
    CHAT: {"model": MODEL, "messages": [{"role": "user", "content": TEXT[:64]}], "max_tokens": 4},
    **engine.OWN_STREAMS,
}


@pytest.mark.parametrize("route", STREAMS)
def test_the_last_event_of_a_stream_names_it(route: str, server: Server) -> None:
    request = {**STREAMS[route], "stream": True}
    *events, last, end = server.http.post(route, json=request).raise_for_status().text.split("\n\n")[:-1]
    assert end == "data: [DONE]"
    named = [engine.TARGET_IN_A_RESPONSE.format(LOWER) in event for event in (*events, last)]
    assert named == [False] * len(events) + [True]


@needs_prometheus
def test_the_dashboard_shows_the_target(server: Server, tmp_path: Path) -> None:
    """The line that `test_dashboard.py` leaves out, as its server has no dial."""
    (query,) = (query for query in queries(rate_interval="5m") if "target" in query.legend)
    with scraping(server, tmp_path) as prometheus:
        wait_until(lambda: [series.points[0][1] for series in prometheus.ask(query.expression)] == [LOWER])


def test_the_target_falls_while_requests_wait_and_rises_again(server: Server) -> None:
    assert server.metric(TARGET) == LOWER
    with ThreadPoolExecutor() as pool:
        burst = pool.submit(load, server, rounds=1, at_once=3 * AT_ONCE, new_tokens=2 * NEW_TOKENS)
        wait_until(lambda: server.metric(TARGET) == LOWEST)
        named = burst.result()
    wait_until(lambda: server.metric(TARGET) == LOWER)
    assert {LOWEST, LOWER} <= named, "as an answer is finished"


def test_its_administrator_turns_it_and_lets_it_begin_anew(server: Server) -> None:
    assert engine.turn_dial(server, 5) == ""
    wait_until(lambda: server.metric(TARGET) == 5)
    held = biases(server)
    assert load(server, rounds=1) == {5}
    wait_until(lambda: all(now < before - 1e-4 for now, before in zip(biases(server), held, strict=True)))
    engine.reset_dial(server)
    wait_until(lambda: biases(server) == [0, 0])
    assert server.metric(TARGET) == 5
    assert engine.turn_dial(server, [3, LOWER]) == ""
    wait_until(lambda: server.metric(TARGET) == 3)


@pytest.mark.parametrize("target", [6, 0, -1, 1e9, "many", None, [2, 6]])
def test_what_cannot_be_held_is_refused_and_the_server_goes_on(target: Any, server: Server) -> None:
    assert engine.turn_dial(server, LOWER) == ""
    assert engine.turn_dial(server, target) != ""
    request = {"model": MODEL, "prompt": TEXT[:64], "max_tokens": 4}
    server.http.post(COMPLETIONS, json=request).raise_for_status()
    time.sleep(INTERVAL_S + 0.5)
    assert server.metric(TARGET) == LOWER
