"""The Nano that calls tools in a real loop over HTTP: by hand, streamed and not, and by the example agents of three
clients."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from examples.nano.tools.domain import tools
from longcat_nano import TOOLS_CHECKPOINT
from tests.chats import Said, asked, openai_client
from tests.harness import engine
from tests.requests import MODEL
from tests.server import Server, serving

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-agents" / "bin" / "python"
"""The clients' own environment (`make agents`): the engines pin other versions of what they need."""
EXAMPLES = ["agent", "agent_langchain", "agent_openai_sdk"]
TOOLS = tools()


@pytest.fixture(scope="module", autouse=True)
def clients() -> None:
    assert PYTHON.exists(), f"{PYTHON} is not there; run make agents"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = engine.command(TOOLS_CHECKPOINT, served_name=MODEL, max_model_len=2048, cache_tokens=16 * 1024)
    with serving(
        [*command, *engine.speculation_flags(3), *engine.PARSER_FLAGS], tmp_path_factory.mktemp("served") / "server.log"
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with openai_client(server) as client:
        yield client


def loop(client: OpenAI, question: str, run: Callable[[str, dict[str, Any]], str], *, stream: bool) -> list[Said]:
    """What the model says, turn for turn, until it answers."""
    messages: list[Any] = [{"role": "user", "content": question}]
    turns: list[Said] = []
    while not turns or turns[-1].calls:
        assert len(turns) < 5, turns
        said = asked(client, messages, stream=stream, tools=TOOLS, temperature=0)
        turns.append(said)
        calls = [
            {"id": f"{len(turns)}-{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for n, (name, arguments) in enumerate(said.calls)
        ]
        messages.append({"role": "assistant", "content": said.content, "reasoning_content": said.reasoning})
        if calls:
            messages[-1]["tool_calls"] = calls
        for call, (name, arguments) in zip(calls, said.calls, strict=True):
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": run(name, json.loads(arguments))})
    return turns


def calculate(name: str, arguments: dict[str, int]) -> str:
    return str(arguments["a"] + arguments["b"] if name == "add" else arguments["a"] * arguments["b"])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_it_thinks_makes_two_calls_at_once_and_answers_with_their_results(stream: bool, client: OpenAI) -> None:
    first, last = loop(client, "What are 12 plus 30 and 7 times 8?", calculate, stream=stream)
    assert first.reasoning
    assert first.finish == "tool_calls"
    assert [(name, json.loads(arguments)) for name, arguments in first.calls] == [
        ("add", {"a": 12, "b": 30}),
        ("multiply", {"a": 7, "b": 8}),
    ]
    assert last.finish == "stop"
    assert "42" in last.content
    assert "56" in last.content
    counted = (last.usage.get("completion_tokens_details") or last.usage)["reasoning_tokens"]
    assert bool(counted) == bool(last.reasoning)


def test_a_tool_that_fails_is_told_of(client: OpenAI) -> None:
    turns = loop(client, 'Read "notes/zebra.txt".', lambda *_: "Error: no such file", stream=True)
    assert [call[0] for call in turns[0].calls] == ["read_file"]
    assert "no such file" in turns[-1].content


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_required_call_is_guided_behind_reasoning(stream: bool, client: OpenAI) -> None:
    question = [{"role": "user", "content": "Hello!"}]
    said = asked(client, question, stream=stream, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert said.reasoning
    ((name, arguments),) = said.calls
    wanted = next(tool["function"] for tool in TOOLS if tool["function"]["name"] == name)
    assert list(json.loads(arguments)) == wanted["parameters"]["required"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_example_agents_come_to_the_answer(example: str, server: Server, tmp_path: Path) -> None:
    for question, wanted in (
        ("What are 12 plus 30 and 7 times 8?", ["add", "multiply", "42", "56"]),
        ('Read "notes/zebra.txt".', ["read_file", "no such file"]),
    ):
        url = f"{server.http.base_url}/v1"
        command = [PYTHON, ROOT / "examples" / f"{example}.py", url, question]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
        assert ran.returncode == 0, ran.stderr
        for text in wanted:
            assert text in ran.stdout


def test_drafts_are_accepted_in_calls(server: Server) -> None:
    assert server.metric(engine.METRICS.generated) > 2 * server.metric(engine.METRICS.verifications)


def test_an_example_says_what_is_wrong(tmp_path: Path) -> None:
    command = [PYTHON, ROOT / "examples" / "agent.py"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert ran.returncode == 1
    assert "usage:" in ran.stderr
