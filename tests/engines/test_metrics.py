"""What a stock server's `/metrics` say of the experts that tokens take: exactly what the reference's routers choose."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor
from typer.testing import CliRunner

from longcat_cli.commands import app
from longcat_cli.make_checkpoint import make_checkpoint
from longcat_core.inspection import routings
from longcat_core.observation.publication import INTERVAL_S
from longcat_core.reference import LongcatForCausalLM
from tests.harness import engine
from tests.prometheus import needs_prometheus, queries, scraping
from tests.requests import CASE, COMPLETIONS, MODEL
from tests.server import Server, processes_of, serving, title, wait_until

NEW_TOKENS = 12
FIRST_PROMPT, *PROMPTS = [CASE.prompts(1, length, seed=length)[0] for length in (2, 1, 20, 33)]
"""No two begin alike, so that none is found in the prefix cache."""
RANKS = 2
Key = tuple[str, str, str]
"""A sample's name, its layer, and its bucket's bound or the kind of its choices."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("counted") / "checkpoint"
    make_checkpoint(directory, CASE.config, seed=0, dtype=torch.float32)
    return directory


@pytest.fixture(scope="module")
def reference(directory: Path) -> LongcatForCausalLM:
    return LongcatForCausalLM.from_checkpoint(directory).eval()


def model_of(server: Server) -> str:
    """As it calls its model."""
    name: str = server.http.get("/v1/models").raise_for_status().json()["data"][0]["id"]
    return name


def shown(server: Server) -> dict[Key, float]:
    families = text_string_to_metric_families(server.http.get("/metrics").raise_for_status().text)
    samples = [sample for family in families for sample in family.samples if sample.name.startswith("longcat:")]
    assert {sample.labels["model_name"] for sample in samples} <= {model_of(server)}
    assert all(engine.METRIC_LABELS.items() <= sample.labels.items() for sample in samples)
    return {
        (sample.name, sample.labels["layer"], sample.labels.get("le", sample.labels.get("kind", ""))): sample.value
        for sample in samples
    }


def settled(server: Server) -> dict[Key, float]:
    """When nothing is counted any more. On a busy machine a look at the counts is seconds late."""
    found, since = shown(server), time.monotonic()
    while time.monotonic() - since < 3 * INTERVAL_S:
        time.sleep(0.2)
        if (now := shown(server)) != found:
            found, since = now, time.monotonic()
    return found


@torch.no_grad()
def steps_of(model: LongcatForCausalLM, prompt: list[int], answer: list[int]) -> Iterator[list[Tensor]]:
    """The choices [T, K] of each layer, step by step: of the prompt, then of each token but those not computed."""
    computed = answer[: len(answer) - 1 + engine.STEPS_BEHIND_THE_END]
    with routings(model) as noted:
        model(torch.tensor([prompt + computed]))
    ends = [len(prompt) + position for position in range(len(computed) + 1)]
    for start, end in zip([0, *ends], ends, strict=False):
        yield [layer.ids[start:end] for layer in noted]


def wanted(steps: list[list[Tensor]], ranks: int) -> Mapping[Key, float]:
    """Counted in another way than the engines count, one choice after the other."""
    found = Counter[Key]()
    experts = CASE.config.n_routed_experts
    for step in steps:
        for layer, ids in enumerate(map(Tensor.tolist, step)):
            rows, of_ranks = Counter[int](), Counter[int]()
            for token in ids:
                taken = [expert for expert in token if expert != -1]
                rows.update(taken)
                of_ranks.update(expert * ranks // experts for expert in taken)
                for most in (*range(len(taken), len(token) + 1), float("inf")):
                    found["longcat:ffn_experts_per_token_bucket", str(layer), bound(most)] += 1
                found["longcat:ffn_experts_per_token_sum", str(layer), ""] += len(taken)
                found["longcat:ffn_experts_per_token_count", str(layer), ""] += 1
                found["longcat:expert_choices_total", str(layer), "ffn"] += len(taken)
                found["longcat:expert_choices_total", str(layer), "zero"] += len(token) - len(taken)
            found["longcat:busiest_expert_tokens_total", str(layer), ""] += max(rows.values(), default=0)
            found["longcat:mean_expert_tokens_total", str(layer), ""] += rows.total() / experts
            if ranks > 1:
                found["longcat:busiest_rank_rows_total", str(layer), ""] += max(of_ranks.values(), default=0)
                found["longcat:mean_rank_rows_total", str(layer), ""] += rows.total() / ranks
    return found


def answer(server: Server, prompt: list[int]) -> list[int]:
    request = {"model": model_of(server), "prompt": prompt, "temperature": 0, "max_tokens": NEW_TOKENS}
    request |= {"ignore_eos": True}
    body = server.http.post(COMPLETIONS, json=request | {"return_token_ids": True}).raise_for_status().json()
    tokens: list[int] = body["choices"][0]["token_ids"]
    return tokens


def bound(number: float) -> str:
    return "+Inf" if number == float("inf") else f"{number:.1f}"


def assert_counts_what_the_reference_chooses(server: Server, reference: LongcatForCausalLM, ranks: int) -> None:
    assert shown(server), "shown before the first request"
    answer(server, FIRST_PROMPT)  # after it, those that the server asks itself for its health have been answered
    before, steps = settled(server), []
    for prompt in PROMPTS:
        tokens = answer(server, prompt)
        assert tokens == reference.generate(prompt, NEW_TOKENS)
        steps += steps_of(reference, prompt, tokens)
    expected = wanted(steps, ranks)
    wait_until(lambda: shown(server) != before)
    after = settled(server)
    assert {key: after[key] - before[key] for key in after if after[key] != before[key]} == expected
    assert all(key in after for key in expected)


def test_a_server_counts_what_the_reference_chooses(
    directory: Path, reference: LongcatForCausalLM, tmp_path: Path
) -> None:
    """Under the directory's name, as with the commands of docs/observability.md."""
    with serving(engine.command(directory), tmp_path / "server.log") as server:
        assert model_of(server) == str(directory)
        assert_counts_what_the_reference_chooses(server, reference, ranks=1)
        top = CliRunner().invoke(app, ["top", str(server.http.base_url)], env={"no_proxy": "127.0.0.1"})
        assert top.stdout.startswith(f"{directory} in {engine.NAME}; requests: 0 running, 0 waiting\n"), top.output


@pytest.fixture(scope="module")
def server_of_ranks(directory: Path) -> Iterator[Server]:
    """Ranks that share experts, with several servers of the API, where the engine has such."""
    command = [*engine.command(directory, served_name=MODEL), *engine.expert_parallel_flags(RANKS)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in engine.environment_of_ranks(RANKS).items():
            patch.setenv(name, value)
        with serving(command, directory.with_name("server.log")) as server:
            yield server


def test_ranks_that_share_experts_count_a_token_once(server_of_ranks: Server, reference: LongcatForCausalLM) -> None:
    assert_counts_what_the_reference_chooses(server_of_ranks, reference, RANKS)


@needs_prometheus
def test_the_dashboard_shows_the_busiest_rank(server_of_ranks: Server, tmp_path: Path) -> None:
    """The panel that `test_dashboard.py` leaves out, as its server is of one rank."""
    (query,) = (query for query in queries(rate_interval="5m") if query.panel == "Busiest rank over the mean")
    with scraping(server_of_ranks, tmp_path) as prometheus:
        answer(server_of_ranks, PROMPTS[-1])
        wait_until(lambda: [1 < series.points[0][1] < RANKS for series in prometheus.ask(query.expression)] == [True])


# -- the end: the module's server of ranks is gone after this ---------------------------------------------


def test_a_rank_that_dies_ends_the_server_and_the_requests_that_run(server_of_ranks: Server) -> None:
    """By itself, without a process left behind."""
    server = server_of_ranks
    (rank,) = (process for process in processes_of(server.process) if title(process).endswith("_TP1_EP1"))
    asked = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 200, "ignore_eos": True, "stream": True}
    with suppress(httpx.TransportError), server.http.stream("POST", COMPLETIONS, json=asked) as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and rank in processes_of(server.process):
                os.kill(rank, signal.SIGKILL)
    assert server.process.wait(60) != 0
    wait_until(lambda: not processes_of(server.process))
    assert engine.SAYS_THAT_RANK_1_DIED in server.log.read_text(errors="replace")
