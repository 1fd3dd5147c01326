"""Every way of sampling, together with others in a batch: greedy answers are those without drafts, and all are answers.

Two stock servers, one of which drafts, are asked the same over HTTP.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from longcat_cli.make_checkpoint import make_checkpoint
from longcat_core.weights import checkpoint
from tests.cases import drafting_tensors
from tests.harness import ENGINE, engine
from tests.requests import COMPLETIONS, MODEL
from tests.server import Server, serving
from tests.speculation import CASE, prompts_of, truth

sampling = import_module(f"tests.{ENGINE}.sampling")
DRAFT_TOKENS, NEW_TOKENS, BATCHES = 3, 16, 8
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
GUIDED: dict[str, Any] = {"json": SCHEMA, "regex": "(ab|c){2,5}", "choice": ["zero", "expert", "zeroth"]}
PARAMETERS: dict[str, list[Any]] = {
    "top_k": [1, 5, 40],
    "top_p": [1e-6, 0.3, 0.95],
    "min_p": [0.05, 0.5],
    "frequency_penalty": [-0.5, 1.5],
    "presence_penalty": [-1.0, 1.7],
    "repetition_penalty": [0.8, 1.5],
    "logit_bias": [{"7": 100.0}, {"7": 4.0, "9": -100.0}],
    "seed": [0, 7],
    "logprobs": [0, 2],
    "echo": [True],
    "stop": ["a", [" the", "e"]],
    "stop_token_ids": [[9, 11, 13]],
    "ignore_eos": [True],
    "min_tokens": [1, 8],
    **sampling.PARAMETERS,
}


class Servers(NamedTuple):
    drafting: Server
    plain: Server


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Of one checkpoint, with a tokenizer, whose drafts are partly accepted; started at the same time."""
    directory = tmp_path_factory.mktemp("sampled") / "checkpoint"
    make_checkpoint(directory, CASE.config, seed=0, dtype=torch.float32)
    for file in [*checkpoint.shards(directory), directory / checkpoint.INDEX_NAME]:
        file.unlink()
    checkpoint.save(drafting_tensors(CASE.config), directory)
    command = [*engine.command(directory, served_name=MODEL), *sampling.BESIDE_ANOTHER]
    commands = {"drafting": [*command, *engine.speculation_flags(DRAFT_TOKENS)], "plain": command}

    def start(stack: ExitStack, name: str) -> Server:
        return stack.enter_context(serving(commands[name], directory.with_name(f"{name}.log")))

    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack, ThreadPoolExecutor(2) as starters:
        patch.setenv("OMP_NUM_THREADS", "1")  # threads of two servers would wait for each other's cores
        yield Servers(**dict(zip(commands, starters.map(lambda name: start(stack, name), commands), strict=True)))


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    prompt = draw(st.sampled_from([*prompts_of(CASE), "def zero(self):"]))
    request: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": NEW_TOKENS, "return_token_ids": True}
    request["temperature"] = draw(st.sampled_from([0, 0, 0, 0.7, 1.0, 2.0]))
    for name in draw(st.lists(st.sampled_from(sorted(PARAMETERS)), max_size=5, unique=True)):
        request[name] = draw(st.sampled_from(PARAMETERS[name]))
    if request["temperature"]:
        request["n"] = draw(st.sampled_from([1, 1, 3]))  # vLLM refuses several of one greedy answer
    if draw(st.sampled_from([False, False, True])):
        kind = draw(st.sampled_from(sorted(GUIDED)))
        request |= sampling.guided(kind, GUIDED[kind])
        # What is allowed beside a grammar could leave no token at all. A grammar that ends contradicts `ignore_eos`:
        # without drafts, SGLang adds a token after such an end.
        at_odds = ("allowed_token_ids", "bad_words", "ignore_eos")
        request = {key: value for key, value in request.items() if key not in at_odds}
    return request


def is_greedy(request: dict[str, Any]) -> bool:
    return request["temperature"] == 0 or request.get("top_k") == 1


def ask(server: Server, batch: list[dict[str, Any]]) -> list[httpx.Response]:
    """All at once."""
    with ThreadPoolExecutor(len(batch)) as clients:
        return list(clients.map(lambda request: server.http.post(COMPLETIONS, json=request), batch))


def answers(response: httpx.Response) -> list[tuple[list[int], str]]:
    return [(choice["token_ids"], choice["finish_reason"]) for choice in response.json()["choices"]]


def assert_serves_as_before(server: Server) -> None:
    prompt = prompts_of(CASE)[2]
    request = {"model": MODEL, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    (response,) = ask(server, [request | {"return_token_ids": True}])
    assert response.is_success, response.text
    assert answers(response) == [(truth(CASE, prompt, NEW_TOKENS, DRAFT_TOKENS).tokens, "length")]


@settings(
    derandomize=True,
    database=None,
    max_examples=BATCHES,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(batch=st.lists(requests(), min_size=4, max_size=8))
def test_whatever_is_asked_is_answered_and_greedy_answers_are_those_without_drafts(
    servers: Servers, batch: list[dict[str, Any]]
) -> None:
    ours = ask(servers.drafting, batch)
    for request, response in zip(batch, ours, strict=True):
        assert response.status_code == (400 if sampling.is_refused_with_drafts(request) else 200), (
            request,
            response.text,
        )
    greedy = [n for n, request in enumerate(batch) if is_greedy(request) and ours[n].is_success]
    if greedy:
        wanted = ask(servers.plain, [batch[n] for n in greedy])
        for n, response in zip(greedy, wanted, strict=True):
            assert answers(ours[n]) == answers(response), batch[n]
    assert_serves_as_before(servers.drafting)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("kind", GUIDED)
def test_a_guided_answer_is_of_its_language(kind: str, temperature: float, servers: Servers) -> None:
    request = {"model": MODEL, "prompt": prompts_of(CASE)[1], "max_tokens": 100, "temperature": temperature}
    for response in ask(servers.drafting, [request | sampling.guided(kind, GUIDED[kind])] * 3):
        (choice,) = response.raise_for_status().json()["choices"]
        if choice["finish_reason"] == "length":  # as long as the model likes to go on with whitespace or digits
            assert kind == "json"
        elif kind == "json":
            assert isinstance(json.loads(choice["text"])["n"], int)
        else:
            pattern = "|".join(GUIDED[kind]) if kind == "choice" else GUIDED[kind]
            assert re.fullmatch(pattern, choice["text"])
