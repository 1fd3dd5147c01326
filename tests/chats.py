"""A chat over HTTP, as a client of OpenAI's has it: what was said, whole or gathered from a stream."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from openai import DefaultHttpxClient, OpenAI

from tests.requests import MODEL
from tests.server import ONE_REQUEST_A_CONNECTION, Server


class Said(NamedTuple):
    """What a client has of an answer, streamed or not."""

    reasoning: str
    content: str
    calls: list[tuple[str, str]]
    finish: str | None
    usage: dict[str, Any]
    prompt: list[int]


@contextmanager
def openai_client(server: Server) -> Iterator[OpenAI]:
    with (
        DefaultHttpxClient(trust_env=False, limits=ONE_REQUEST_A_CONNECTION) as http,
        OpenAI(base_url=server.http.base_url.join("/v1"), api_key="none", max_retries=0, http_client=http) as client,
    ):
        yield client


def asked(client: OpenAI, messages: list[Any], *, stream: bool, **wanted: Any) -> Said:
    """wanted: parameters of OpenAI's, and `extra_body`."""
    request: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": 400, **wanted}
    if stream:
        chunks = client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
        return gathered(chunks)
    whole = client.chat.completions.create(**request)
    choice = whole.choices[0]
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
    prompt = getattr(whole, "prompt_token_ids", None) or getattr(choice, "prompt_token_ids", None) or []
    usage = whole.usage.model_dump()
    return Said(reasoning_of(choice.message), choice.message.content or "", calls, choice.finish_reason, usage, prompt)


def gathered(chunks: Iterable[Any]) -> Said:
    reasoning, content, finish, usage = "", "", None, {}
    calls: dict[int, list[str]] = {}
    for chunk in chunks:
        usage = chunk.usage.model_dump() if chunk.usage else usage
        for choice in chunk.choices:
            assert finish is None or not choice.delta.content, "something comes behind the end"
            finish = choice.finish_reason or finish
            reasoning += reasoning_of(choice.delta)
            content += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                if call.function.name:
                    assert call.index == len(calls)
                    assert call.id
                    calls[call.index] = [call.function.name, ""]
                calls[call.index][1] += call.function.arguments or ""
    return Said(reasoning, content, [(name, arguments) for name, arguments in calls.values()], finish, usage, [])


def reasoning_of(message: Any) -> str:
    """Under vLLM's name, or SGLang's."""
    return getattr(message, "reasoning", None) or getattr(message, "reasoning_content", None) or ""
