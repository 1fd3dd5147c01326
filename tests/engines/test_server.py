"""The stock server over HTTP: the right tokens by every route, and no request that harms the next one."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache
from http.client import HTTPConnection
from importlib import import_module
from pathlib import Path
from threading import Barrier
from typing import Any, NamedTuple

import pytest
import torch
from openai import DefaultHttpxClient, OpenAI
from transformers import AutoTokenizer, LongcatFlashForCausalLM

from longcat_cli.make_checkpoint import make_checkpoint
from longcat_core.weights import checkpoint
from tests.harness import ENGINE, engine
from tests.oracle import Greedy, assert_greedy_equal, greedy, oracle, oracle_logits, relative_error
from tests.requests import CACHE_TOKENS, CASE, COMPLETIONS, MAX_MODEL_LEN, MODEL
from tests.server import ONE_REQUEST_A_CONNECTION, Server, processes_of, serving, wait_until
from tests.threads import threads

BAD_REQUESTS = import_module(f"tests.{ENGINE}.bad_requests").BAD_REQUESTS
NEW_TOKENS = 16
PROMPT = CASE.prompts(1, 20)[0]
MESSAGES: list[Any] = [{"role": "user", "content": "What does a zero expert cost?"}]
SAMPLING: dict[str, Any] = {"temperature": 0, "max_tokens": NEW_TOKENS}
EXTENSIONS = {"ignore_eos": True, "return_token_ids": True}
"""Parameters of both engines' own, beside OpenAI's."""
REQUEST: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, **SAMPLING, **EXTENSIONS}


class Answer(NamedTuple):
    prompt: list[int]
    tokens: list[int]
    text: str


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "checkpoint"
    make_checkpoint(directory, CASE.config, seed=0, dtype=torch.float32)
    return directory


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Server]:
    command = engine.command(directory, served_name=MODEL, max_model_len=MAX_MODEL_LEN, cache_tokens=CACHE_TOKENS)
    with serving(command, directory.with_name("server.log")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with (
        DefaultHttpxClient(trust_env=False, limits=ONE_REQUEST_A_CONNECTION) as http,
        OpenAI(base_url=server.http.base_url.join("/v1"), api_key="none", max_retries=0, http_client=http) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def truth(directory: Path) -> Iterator[LongcatFlashForCausalLM]:
    with threads(1):  # several that wait for each other on cores that a server uses take 80 times as long
        yield oracle(CASE.config, checkpoint.load(directory, CASE.config))


@cache
def continuation(truth: LongcatFlashForCausalLM, prompt: tuple[int, ...], new_tokens: int = NEW_TOKENS) -> list[Greedy]:
    return greedy(truth, prompt, new_tokens)


def completion(server: Server, **changes: Any) -> dict[str, Any]:
    return server.http.post(COMPLETIONS, json=REQUEST | changes).raise_for_status().json()["choices"][0]


def assert_serves_as_before(server: Server, truth: LongcatFlashForCausalLM) -> None:
    compared = assert_greedy_equal(completion(server)["token_ids"], continuation(truth, tuple(PROMPT)))
    assert compared == NEW_TOKENS, "the reference request must have clear winners only"


# -- the right tokens --------------------------------------------------------------------------------


def test_a_server_that_started_has_logged_that_its_engine_did(server: Server) -> None:
    """So that its absence from a log means something in test_bad_checkpoints.py."""
    assert engine.STARTED in server.log.read_text()


def test_a_completion_has_the_oracles_logits(server: Server, truth: LongcatFlashForCausalLM) -> None:
    answer = completion(server, logprobs=5)
    whole = torch.tensor([[*PROMPT, *answer["token_ids"]]])
    exact = oracle_logits(truth, whole)[0, len(PROMPT) - 1 : -1].log_softmax(dim=-1)
    compared = assert_greedy_equal(answer["token_ids"], continuation(truth, tuple(PROMPT)))
    ours = torch.tensor(answer["logprobs"]["token_logprobs"])
    theirs = exact.gather(1, whole[0, len(PROMPT) :].unsqueeze(1)).squeeze(1)
    assert relative_error(ours[:compared], theirs[:compared]) < 1e-4


def test_a_completion_has_the_oracles_tokens(client: OpenAI, truth: LongcatFlashForCausalLM) -> None:
    choice = client.completions.create(model=MODEL, prompt=PROMPT, **SAMPLING, extra_body=EXTENSIONS).choices[0]
    assert choice.finish_reason == "length"
    assert choice.prompt_token_ids == PROMPT
    assert_greedy_equal(choice.token_ids, continuation(truth, tuple(PROMPT)))


def test_a_streamed_completion_has_the_tokens_and_the_text_of_a_whole_one(
    client: OpenAI, truth: LongcatFlashForCausalLM
) -> None:
    whole = client.completions.create(model=MODEL, prompt=PROMPT, **SAMPLING, extra_body=EXTENSIONS).choices[0]
    stream = client.completions.create(model=MODEL, prompt=PROMPT, **SAMPLING, extra_body=EXTENSIONS, stream=True)
    choices = [choice for chunk in stream for choice in chunk.choices]
    assert len(choices) > NEW_TOKENS / 2, "not token by token"
    assert_greedy_equal([t for choice in choices for t in choice.token_ids or []], continuation(truth, tuple(PROMPT)))
    assert "".join(choice.text for choice in choices) == whole.text
    assert choices[-1].finish_reason == "length"


def chat(client: OpenAI) -> Answer:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, **SAMPLING, extra_body=EXTENSIONS)
    choice = whole.choices[0]
    # vLLM's place and name, or SGLang's.
    prompt = getattr(whole, "prompt_token_ids", None) or choice.prompt_token_ids
    tokens = getattr(choice, "token_ids", None) or choice.response_token_ids
    return Answer(prompt, tokens, choice.message.content or "")


def test_a_chat_is_in_longcats_format_and_has_the_oracles_tokens(
    client: OpenAI, truth: LongcatFlashForCausalLM, directory: Path
) -> None:
    answer = chat(client)
    prompt = AutoTokenizer.from_pretrained(directory).decode(answer.prompt)
    assert prompt == f"[Round 0] USER:{MESSAGES[0]['content']} ASSISTANT:"
    assert_greedy_equal(answer.tokens, continuation(truth, tuple(answer.prompt)))


def test_a_streamed_chat_is_the_whole_one(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, **SAMPLING, extra_body={"ignore_eos": True}, stream=True
    )
    parts = [choice.delta.content or "" for chunk in stream for choice in chunk.choices]
    assert len(parts) > NEW_TOKENS / 2, "not token by token"
    assert "".join(parts) == chat(client).text


def test_an_answer_goes_on_to_the_last_position_of_the_context(server: Server, truth: LongcatFlashForCausalLM) -> None:
    prompt = CASE.prompts(1, MAX_MODEL_LEN - 8, seed=1)[0]
    choice = completion(server, prompt=prompt, max_tokens=8)
    assert choice["finish_reason"] == "length"
    tokens = choice["token_ids"]
    assert len(tokens) >= 6, "SGLang keeps two positions free, vLLM none"
    assert_greedy_equal(tokens, continuation(truth, tuple(prompt), 8)[: len(tokens)])


# -- bad requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_for_its_reason_and_harms_nothing(
    name: str, server: Server, truth: LongcatFlashForCausalLM
) -> None:
    bad = BAD_REQUESTS[name]
    good = REQUEST if bad.path == COMPLETIONS else {"model": MODEL, "messages": MESSAGES, **SAMPLING}
    content = json.dumps(good | (bad.changes or {})) if bad.content is None else bad.content
    response = server.http.post(bad.path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == bad.status, response.text
    body = response.json()
    assert bad.message in body.get("error", body)["message"]
    assert_serves_as_before(server, truth)


def test_a_field_that_no_engine_knows_changes_nothing(server: Server, truth: LongcatFlashForCausalLM) -> None:
    tokens = completion(server, zero_expert_discount=0.5)["token_ids"]
    assert_greedy_equal(tokens, continuation(truth, tuple(PROMPT)))


# -- load --------------------------------------------------------------------------------------------


def hang_up_after_two_chunks(server: Server, request: dict[str, Any]) -> None:
    with server.http.stream("POST", COMPLETIONS, json=request | {"stream": True}) as response:
        lines = response.iter_lines()
        assert [next(lines)[:6], next(lines), next(lines)[:6]] == ["data: ", "", "data: "]
        wait_until(lambda: server.metric(engine.METRICS.running) > 0)  # SGLang counts at the end of a step


def hang_up_before_the_answer(server: Server, request: dict[str, Any]) -> None:
    before = server.metric(engine.METRICS.generated)
    connection = HTTPConnection(server.http.base_url.host, server.http.base_url.port)
    with closing(connection):
        connection.request("POST", COMPLETIONS, json.dumps(request), {"content-type": "application/json"})
        wait_until(lambda: server.metric(engine.METRICS.generated) > before)


@pytest.mark.parametrize("hang_up", [hang_up_after_two_chunks, hang_up_before_the_answer])
def test_the_request_of_a_client_that_goes_away_is_aborted(
    hang_up: Callable[[Server, dict[str, Any]], None], server: Server, truth: LongcatFlashForCausalLM
) -> None:
    answers, length = 64, MAX_MODEL_LEN - len(PROMPT)  # so much that a slow hang-up still comes early
    before = server.metric(engine.METRICS.generated)
    hang_up(server, REQUEST | {"prompt": [PROMPT] * answers, "max_tokens": length})
    unfinished = (engine.METRICS.running, engine.METRICS.waiting)
    wait_until(lambda: not any(server.metric(name) for name in unfinished))
    generated = server.metric(engine.METRICS.generated) - before
    assert 0 < generated < answers * length / 2, "it was not aborted, it was finished"
    assert_serves_as_before(server, truth)


def test_64_requests_at_once_on_a_cache_for_a_few_have_the_oracles_tokens(
    server: Server, truth: LongcatFlashForCausalLM
) -> None:
    prompts = [CASE.prompts(1, 12 + n % 17, seed=n)[0] for n in range(64)]
    new_tokens = 48  # answers grow to several times their prompts, so that the cache overflows whoever comes first
    before = server.metric(engine.METRICS.preemptions, default=0)
    together = Barrier(64)

    def answer(prompt: list[int]) -> list[int]:
        together.wait(30)
        return completion(server, prompt=prompt, max_tokens=new_tokens)["token_ids"]

    with ThreadPoolExecutor(64) as clients:
        answers = list(clients.map(answer, prompts))
    assert server.metric(engine.METRICS.preemptions) > before
    truths = [continuation(truth, tuple(prompt), new_tokens) for prompt in prompts]
    compared = sum(map(assert_greedy_equal, answers, truths))
    assert compared > 0.9 * 64 * new_tokens
    assert_serves_as_before(server, truth)


# -- the end: the module's server is gone after this -------------------------------------------------


def test_sigterm_in_mid_answer_ends_the_server_and_all_its_processes(server: Server) -> None:
    with server.http.stream("POST", COMPLETIONS, json=REQUEST | {"stream": True, "max_tokens": 200}) as response:
        assert next(response.iter_lines()).startswith("data: ")
        assert len(processes_of(server.process)) > 1
        assert server.end() == 0
    wait_until(lambda: not processes_of(server.process))
