"""Tool calls and reasoning over HTTP: three endpoints of the stock server, streamed and not, with drafts.

A grammar has a model of random weights say what a test wants it to say; guided calls are drawn freely within theirs.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from anthropic import Anthropic
from anthropic import DefaultHttpxClient as AnthropicHttpxClient
from openai import OpenAI
from transformers import AutoTokenizer

from longcat_cli.make_checkpoint import make_checkpoint
from longcat_core.chat.tags import CALL_CLOSE, CALL_OPEN, THINK_CLOSE, THINK_OPEN
from longcat_core.chat.templates import THINKING_2601, Form
from longcat_core.chat.tools import Tool
from longcat_core.weights import checkpoint
from tests.cases import DEFAULT, drafting_tensors
from tests.chats import asked, openai_client
from tests.conversations import xml_call
from tests.harness import engine
from tests.requests import MODEL
from tests.server import ONE_REQUEST_A_CONNECTION, Server, serving

DRAFT_TOKENS = 2
TRIES = 200
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "pattern": "^[a-z]{1,4}$"},
        "unit": {"enum": ["C", "F"]},
        "hourly": {"type": "boolean"},
    },
    "required": ["city", "unit", "hourly"],
    "additionalProperties": False,
}
DAY: dict[str, Any] = {
    "type": "object",
    "properties": {"day": {"enum": ["Mo", "Tu"]}},
    "required": ["day"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": CITY, "open": DAY}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
QUESTION: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}]
CALLS = [("weather", {"city": "Rom", "unit": "C"}), ("open", {"day": "Mo"})]
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The checkpoint has the tokens of 2601, and brings no chat template."""
    directory = tmp_path_factory.mktemp("served") / "checkpoint"
    config = replace(DEFAULT, vocab_size=512, max_position_embeddings=2048)
    make_checkpoint(directory, config, seed=0, dtype=torch.float32, template=THINKING_2601)
    for file in checkpoint.shards(directory):
        file.unlink()
    (directory / checkpoint.INDEX_NAME).unlink()
    checkpoint.save(drafting_tensors(config), directory)
    (directory / "chat_template.jinja").unlink()
    command = engine.command(directory, served_name=MODEL, max_model_len=2048, cache_tokens=64 * 1024)
    flags = [*engine.speculation_flags(DRAFT_TOKENS), *engine.PARSER_FLAGS]
    with serving([*command, *flags], directory.with_name("server.log")) as server:
        yield server
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with openai_client(server) as client:
        yield client


@pytest.fixture(scope="module")
def anthropic(server: Server) -> Iterator[Anthropic]:
    with (
        AnthropicHttpxClient(trust_env=False, limits=ONE_REQUEST_A_CONNECTION) as http,
        Anthropic(base_url=str(server.http.base_url), api_key="none", max_retries=0, http_client=http) as client,
    ):
        yield client


def saying(text: str) -> dict[str, Any]:
    """Parameters that let the model say this text alone."""
    literal = "".join(f"\\{character}" if character in r".^$*+?{}[]\|()" else character for character in text)
    return engine.matching(literal.replace("\n", r"\n")) | NO_THINKING


def written(form: Form) -> str:
    if form is Form.XML:
        return "\n".join(xml_call(Tool(name, SCHEMAS[name]), arguments) for name, arguments in CALLS)
    calls = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in CALLS]
    return "\n".join(f"{CALL_OPEN}\n{call}\n{CALL_CLOSE}" for call in calls)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("form", Form, ids=lambda form: form.name)
def test_an_answer_is_told_apart_into_reasoning_content_and_parallel_calls(
    form: Form, stream: bool, client: OpenAI
) -> None:
    answer = f"{THINK_OPEN}\nTwo calls.\n{THINK_CLOSE}\nI look. {written(form)}"
    said = asked(client, QUESTION, stream=stream, tools=TOOLS, extra_body=saying(answer))
    assert (said.reasoning, said.content, said.finish) == ("Two calls.", "I look. ", "tool_calls")
    assert [(name, json.loads(arguments)) for name, arguments in said.calls] == CALLS
    assert said.usage["completion_tokens"] <= len(answer) + 1
    assert said.usage["prompt_tokens"] > len("".join(tool["function"]["name"] for tool in TOOLS))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_looks_like_a_call_is_text_where_none_is_wanted(stream: bool, client: OpenAI) -> None:
    answer = f"I look.\n{written(Form.XML)}"
    said = asked(client, QUESTION, stream=stream, tools=TOOLS, tool_choice="none", extra_body=saying(answer))
    assert (said.content, said.calls, said.finish) == (answer, [], "stop")


def test_results_of_calls_are_in_the_next_prompt_as_the_template_of_2601_has_them(
    client: OpenAI, server: Server, tmp_path: Path
) -> None:
    tool_calls = [
        {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for name, arguments in CALLS
    ]
    messages = [
        *QUESTION,
        {"role": "assistant", "content": "I look.", "tool_calls": tool_calls},
        {"role": "tool", "tool_call_id": "call_open", "content": "closed"},
        {"role": "tool", "tool_call_id": "call_weather", "content": [{"type": "text", "text": "20 C"}]},
    ]
    asked_for_tokens = saying("It is 20 C.") | {"return_token_ids": True}
    said = asked(client, messages, stream=False, tools=TOOLS, extra_body=asked_for_tokens)
    assert (said.content, said.calls, said.finish) == ("It is 20 C.", [], "stop")
    checkpoint_of_server = server.log.with_name("checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_of_server)
    assert tokenizer.chat_template is None
    read = [message | {"content": text_of(message["content"])} for message in messages]
    rendered = tokenizer.apply_chat_template(
        read,
        tools=TOOLS,
        chat_template=THINKING_2601.text,
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=False,
    )
    assert tokenizer.decode(said.prompt) == rendered
    assert "<longcat_tool_response>open\nclosed</longcat_tool_response>" in rendered


def text_of(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def test_required_calls_fit_their_schemas_every_time_and_a_named_function_is_the_one(
    client: OpenAI, server: Server
) -> None:
    named = {"type": "function", "function": {"name": "open"}}

    def try_it(seed: int) -> None:
        wanted = {"tool_choice": named if seed % 4 == 0 else "required", "parallel_tool_calls": False}
        drawn = {"temperature": 1, "seed": seed, "extra_body": NO_THINKING}
        said = asked(client, QUESTION, stream=seed % 2 == 1, tools=TOOLS, **wanted, **drawn)
        assert said.content == "", said
        ((name, arguments),) = said.calls
        assert name == "open" or wanted["tool_choice"] is not named
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
        names.add(name)

    names: set[str] = set()
    drafted = server.metric(engine.METRICS.verifications, default=0)
    with ThreadPoolExecutor(32) as clients:
        list(clients.map(try_it, range(TRIES)))
    assert names == set(SCHEMAS)
    assert server.metric(engine.METRICS.verifications) > drafted, "drafts were off"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_reasoning_that_the_prompt_opens_is_reasoning_and_counted(stream: bool, client: OpenAI) -> None:
    said = asked(client, QUESTION, stream=stream, tools=TOOLS, max_tokens=8, temperature=0)
    assert said.reasoning
    assert (said.content, said.calls, said.finish) == ("", [], "length")
    counted = (said.usage.get("completion_tokens_details") or said.usage)["reasoning_tokens"]
    assert 8 <= counted <= 8 + engine.DRAFTS_BEHIND_THE_END * DRAFT_TOKENS


# -- the other endpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "open"}], ids=["required", "named"])
def test_responses_has_guided_calls_of_its_tools(choice: str | dict[str, str], stream: bool, client: OpenAI) -> None:
    tools = [{"type": "function", "strict": True, **tool["function"]} for tool in TOOLS]
    request: dict[str, Any] = {
        "model": MODEL,
        "input": "Weather?",
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_output_tokens": 400,
        "extra_body": NO_THINKING,
    }
    if stream:
        events = list(client.responses.create(**request, stream=True))
        response = events[-1].response
        deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        assert "".join(deltas) == response.output[0].arguments
    else:
        response = client.responses.create(**request)
    assert response.status == "completed"
    (call,) = response.output
    assert call.type == "function_call"
    assert call.name == "open" or choice == "required"
    jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


NAMED = {"type": "tool", "name": "open"}
ANY: dict[str, Any] = {"type": "any", "disable_parallel_tool_use": True}
"""Choices of the messages endpoint; else random weights go on calling."""


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("choice", [ANY, NAMED], ids=["required", "named"])
def test_messages_has_guided_calls_of_its_tools(choice: dict[str, Any], stream: bool, anthropic: Anthropic) -> None:
    message = message_of(anthropic, stream=stream, max_tokens=400, choice=choice)
    block, *more = message.content
    assert (block.type, block.name) == ("tool_use", "open")
    jsonschema.validate(block.input, DAY)
    if engine.NAME == "SGLang" and choice is ANY:  # whose endpoint does not read that one call is wanted
        assert {each.type for each in more} <= {"tool_use"}
    else:
        assert (more, message.stop_reason) == ([], "tool_use")


def test_messages_answers_wherever_a_call_is_cut_off(anthropic: Anthropic) -> None:
    length = message_of(anthropic, stream=False, max_tokens=400).usage.output_tokens
    cut = [message_of(anthropic, stream=False, max_tokens=most) for most in range(2, length, length // 8)]
    assert {message.stop_reason for message in cut} == {"max_tokens"}
    inputs = [block.input for message in cut for block in message.content if block.type == "tool_use"]
    assert {} in inputs, "none was cut within its arguments"


def message_of(client: Anthropic, *, stream: bool, max_tokens: int, choice: dict[str, Any] = NAMED) -> Any:
    request: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": max_tokens,
        "messages": [{"role": "user", "content": "Open?"}],
        "tools": [{"name": "open", "description": "A tool.", "input_schema": DAY}],
        "tool_choice": choice,
        "thinking": {"type": "disabled"},
        "extra_body": NO_THINKING | {"temperature": 0},  # which Anthropic's client has given up
    }
    if not stream:
        return client.messages.create(**request)
    with client.messages.stream(**request) as events:
        return events.get_final_message()


def test_no_parser_has_failed(server: Server) -> None:
    assert not re.search(r"Traceback|Error in .*pars", server.log.read_text())
