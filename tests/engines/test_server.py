"""The stock `vllm serve` over HTTP: the right tokens by every route, and no request that harms the next one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from threading import Barrier
from typing import Any, NamedTuple

import pytest
import torch
from openai import DefaultHttpxClient, OpenAI
from tests.vllm.server import ONE_REQUEST_A_CONNECTION, Server, processes_of, serving
from transformers import AutoTokenizer, LongcatFlashForCausalLM

from longcat_cli.make_checkpoint import make_checkpoint
from longcat_core import checkpoint
from tests.cases import CASES
from tests.oracle import Greedy, assert_greedy_equal, greedy, oracle

CASE = CASES["default"]
MODEL = "longcat"
MAX_MODEL_LEN = 256
CACHE_TOKENS = 640
NEW_TOKENS = 16
PROMPT = CASE.prompts(1, 20)[0]
MESSAGES: list[Any] = [{"role": "user", "content": "What does a zero expert cost?"}]
SAMPLING: dict[str, Any] = {"temperature": 0, "max_tokens": NEW_TOKENS}
EXTENSIONS = {"ignore_eos": True, "return_token_ids": True}
"""Parameters of vLLM's own, beside OpenAI's."""
REQUEST: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, **SAMPLING, **EXTENSIONS}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Answer(NamedTuple):
    prompt: list[int]
    tokens: list[int]
    text: str


@pytest.fixture(autouse=True)
def _engine_is_gone() -> None:
    """In place of conftest.py's: no engine runs in this process, and tidying up after one takes 0.5 s a test."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "checkpoint"
    make_checkpoint(directory, CASE.config, seed=0, dtype=torch.float32)
    return directory


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Server]:
    arguments = {
        "--served-model-name": MODEL,
        "--dtype": "float32",
        "--max-model-len": str(MAX_MODEL_LEN),
        "--block-size": "16",
        "--kv-cache-memory-bytes": str(CACHE_TOKENS * CASE.config.kv_cache_bytes_per_token(itemsize=4)),
    }
    flat = [word for argument in arguments.items() for word in argument]
    with serving(directory, directory.with_name("server.log"), "--enforce-eager", *flat) as server:
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other on cores that a server uses take 80 times as long
    yield oracle(CASE.config, checkpoint.load(directory, CASE.config))
    torch.set_num_threads(threads)


@cache
def continuation(truth: LongcatFlashForCausalLM, prompt: tuple[int, ...], new_tokens: int = NEW_TOKENS) -> list[Greedy]:
    return greedy(truth, prompt, new_tokens)


def completion(server: Server, **changes: Any) -> dict[str, Any]:
    return server.http.post(COMPLETIONS, json=REQUEST | changes).raise_for_status().json()["choices"][0]


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not after {seconds} s"
        time.sleep(0.02)


def assert_serves_as_before(server: Server, truth: LongcatFlashForCausalLM) -> None:
    compared = assert_greedy_equal(completion(server)["token_ids"], continuation(truth, tuple(PROMPT)))
    assert compared == NEW_TOKENS, "the reference request must have clear winners only"


# -- the right tokens --------------------------------------------------------------------------------


def test_a_server_that_started_has_logged_its_engine_process(server: Server) -> None:
    """So that its absence from a log means something in test_bad_checkpoints.py."""
    assert "EngineCore" in server.log.read_text()


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
    assert len(choices) >= NEW_TOKENS, "not token by token"
    assert_greedy_equal([t for choice in choices for t in choice.token_ids or []], continuation(truth, tuple(PROMPT)))
    assert "".join(choice.text for choice in choices) == whole.text
    assert choices[-1].finish_reason == "length"


def chat(client: OpenAI) -> Answer:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, **SAMPLING, extra_body=EXTENSIONS)
    choice = whole.choices[0]
    return Answer(whole.prompt_token_ids, choice.token_ids, choice.message.content or "")


def streamed_chat(client: OpenAI) -> Answer:
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, **SAMPLING, extra_body=EXTENSIONS, stream=True
    )
    chunks = list(stream)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return Answer(
        [token for chunk in chunks for token in getattr(chunk, "prompt_token_ids", None) or []],
        [token for choice in choices for token in getattr(choice, "token_ids", None) or []],
        "".join(choice.delta.content or "" for choice in choices),
    )


def test_a_chat_is_in_longcats_format_and_has_the_oracles_tokens(
    client: OpenAI, truth: LongcatFlashForCausalLM, directory: Path
) -> None:
    answer = chat(client)
    prompt = AutoTokenizer.from_pretrained(directory).decode(answer.prompt)
    assert prompt == f"[Round 0] USER:{MESSAGES[0]['content']} ASSISTANT:"
    assert_greedy_equal(answer.tokens, continuation(truth, tuple(answer.prompt)))


def test_a_streamed_chat_is_the_whole_one(client: OpenAI) -> None:
    assert streamed_chat(client) == chat(client)


def test_an_answer_goes_on_to_the_last_position_of_the_context(server: Server, truth: LongcatFlashForCausalLM) -> None:
    prompt = CASE.prompts(1, MAX_MODEL_LEN - 8, seed=1)[0]
    choice = completion(server, prompt=prompt, max_tokens=100)
    assert choice["finish_reason"] == "length"
    assert_greedy_equal(choice["token_ids"], continuation(truth, tuple(prompt), 8))


# -- bad requests ------------------------------------------------------------------------------------


class Bad(NamedTuple):
    status: int
    message: str
    """A part of it."""
    path: str = COMPLETIONS
    changes: dict[str, Any] | None = None
    content: str | None = None


LONG_CHAT = {"messages": [{"role": "user", "content": "zero " * MAX_MODEL_LEN}]}
VOCABULARY = CASE.config.vocab_size
BAD_REQUESTS = {
    "prompt over the limit": Bad(400, "prompt contains 300 input tokens", changes={"prompt": [5] * 300}),
    "prompt over the limit, and the limit": Bad(400, "context length is 256 tokens", changes={"prompt": [5] * 300}),
    "chat over the limit": Bad(400, "context length is 256 tokens", CHAT, LONG_CHAT),
    "no room for an answer": Bad(400, "max_tokens must be at least 1", changes={"prompt": [5] * MAX_MODEL_LEN}),
    "empty prompt": Bad(400, "at least one prompt", changes={"prompt": []}),
    "unknown model": Bad(404, "`longcat-2` does not exist", changes={"model": "longcat-2"}),
    "unknown model in a chat": Bad(404, "`longcat-2` does not exist", CHAT, {"model": "longcat-2"}),
    "temperature in words": Bad(400, "body.temperature", changes={"temperature": "hot"}),
    "negative temperature": Bad(400, "temperature must be non-negative, got -1.0", changes={"temperature": -1}),
    "negative max_tokens": Bad(400, "max_tokens must be at least 1, got -1", changes={"max_tokens": -1}),
    "negative max_tokens in a chat": Bad(400, "max_tokens must be at least 1, got -1", CHAT, {"max_tokens": -1}),
    "top_p over 1": Bad(400, "top_p must be in (0, 1], got 2.0", changes={"top_p": 2}),
    "no answers asked for": Bad(400, "n must be at least 1, got 0", changes={"n": 0}),
    "first token outside the vocabulary": Bad(
        400, f"Token id {VOCABULARY} is out of vocabulary", changes={"prompt": [5, VOCABULARY, 6]}
    ),
    "token beyond 64 bits": Bad(400, "out of vocabulary", changes={"prompt": [5, 2**70]}),
    "negative token": Bad(400, "greater than or equal to 0", changes={"prompt": [5, -1]}),
    "bias on a token outside the vocabulary": Bad(
        400, f"Vocabulary size: {VOCABULARY}", changes={"logit_bias": {str(VOCABULARY): 1}}
    ),
    "role that the chat template does not know": Bad(
        400,
        "role robot: wanted system, user, assistant or tool",
        CHAT,
        {"messages": [{"role": "robot", "content": "beep"}]},
    ),
    "chat without messages": Bad(400, "at least one message", CHAT, {"messages": []}),
    "malformed JSON": Bad(400, "JSON decode error", content='{"model": '),
    "no body": Bad(400, "Field required", content=""),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_for_its_reason_and_harms_nothing(
    name: str, server: Server, truth: LongcatFlashForCausalLM
) -> None:
    bad = BAD_REQUESTS[name]
    good = REQUEST if bad.path == COMPLETIONS else {"model": MODEL, "messages": MESSAGES, **SAMPLING}
    content = json.dumps(good | (bad.changes or {})) if bad.content is None else bad.content
    response = server.http.post(bad.path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == bad.status, response.text
    assert bad.message in response.json()["error"]["message"]
    assert_serves_as_before(server, truth)


def test_a_field_that_vllm_does_not_know_changes_nothing(server: Server, truth: LongcatFlashForCausalLM) -> None:
    tokens = completion(server, zero_expert_discount=0.5)["token_ids"]
    assert_greedy_equal(tokens, continuation(truth, tuple(PROMPT)))


# -- load --------------------------------------------------------------------------------------------


def hang_up_after_two_chunks(server: Server, request: dict[str, Any]) -> None:
    with server.http.stream("POST", COMPLETIONS, json=request | {"stream": True}) as response:
        lines = response.iter_lines()
        assert [next(lines)[:6], next(lines), next(lines)[:6]] == ["data: ", "", "data: "]
        assert server.metric("vllm:num_requests_running") > 0


def hang_up_before_the_answer(server: Server, request: dict[str, Any]) -> None:
    before = server.metric("vllm:generation_tokens_total")
    connection = HTTPConnection(server.http.base_url.host, server.http.base_url.port)
    with closing(connection):
        connection.request("POST", COMPLETIONS, json.dumps(request), {"content-type": "application/json"})
        wait_until(lambda: server.metric("vllm:generation_tokens_total") > before)


@pytest.mark.parametrize("hang_up", [hang_up_after_two_chunks, hang_up_before_the_answer])
def test_the_request_of_a_client_that_goes_away_is_aborted(
    hang_up: Callable[[Server, dict[str, Any]], None], server: Server, truth: LongcatFlashForCausalLM
) -> None:
    answers, length = 64, MAX_MODEL_LEN - len(PROMPT)  # so much that a slow hang-up still comes early
    before = server.metric("vllm:generation_tokens_total")
    hang_up(server, REQUEST | {"prompt": [PROMPT] * answers, "max_tokens": length})
    unfinished = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    wait_until(lambda: not any(server.metric(name) for name in unfinished))
    generated = server.metric("vllm:generation_tokens_total") - before
    assert 0 < generated < answers * length / 2, "it was not aborted, it was finished"
    assert_serves_as_before(server, truth)


def test_64_requests_at_once_on_a_cache_for_a_few_have_the_oracles_tokens(
    server: Server, truth: LongcatFlashForCausalLM
) -> None:
    prompts = [CASE.prompts(1, 12 + n % 17, seed=n)[0] for n in range(64)]
    new_tokens = 48  # answers grow to several times their prompts, so that the cache overflows whoever comes first
    before = server.metric("vllm:num_preemptions_total")
    together = Barrier(64)

    def answer(prompt: list[int]) -> list[int]:
        together.wait(30)
        return completion(server, prompt=prompt, max_tokens=new_tokens)["token_ids"]

    with ThreadPoolExecutor(64) as clients:
        answers = list(clients.map(answer, prompts))
    assert server.metric("vllm:num_preemptions_total") > before
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
