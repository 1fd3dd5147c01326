"""An agent's waits: until the client holds the first complete call, with drafts and without, and for what each turn of
a long loop prefills.

LongCat-Nano that calls tools, served by the stock command with LongCat's parsers, one request at a time, streamed. What
the parser takes of it is in `bench_chat_parser.py`.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import record
from longcat_nano import TOOLS_CHECKPOINT
from tests.harness import engine
from tests.server import Server, serving

DRAFT_TOKENS = 3
TURNS = 20
BOUNDS = {
    "vllm": ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(256 << 20), "--enable-prompt-tokens-details"],
    "sglang": [*("--context-length", "2048", "--max-total-tokens", "16384"), "--enable-cache-report"],
}
"""On memory and context; and what of a prompt was in the cache is told."""
PAIR = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": text, "parameters": PAIR}}
    for name, text in (("add", "Add two integers."), ("multiply", "Multiply two integers."))
]


def main(requests: int = 40) -> None:
    console = Console(stderr=True)
    waits, turns = [], []
    with tempfile.TemporaryDirectory() as temporary, console.status("") as status:
        for drafts in (0, DRAFT_TOKENS):
            status.update(f"starting {engine.NAME}, {drafts} drafts")
            command = [*engine.stock_command(TOOLS_CHECKPOINT), *BOUNDS[record.ENGINE], *engine.PARSER_FLAGS]
            command += engine.speculation_flags(drafts) if drafts else []
            with serving(command, Path(temporary) / "server.log") as server:
                status.update(f"{engine.NAME}, {drafts} drafts")
                waits.append({"drafts": drafts} | first_calls(server, requests))
                if drafts:
                    turns = loop(server)
    for title, rows in (("until the first complete call", waits), ("what a turn prefills", turns)):
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*(str(value) for value in row.values()))
        Console(width=140).print(table)
    print(record.write("agent", waits, turns=turns, requests=requests, draft_tokens=DRAFT_TOKENS))


def first_calls(server: Server, requests: int) -> dict[str, float]:
    """Seconds and tokens from the request to a call whose arguments are whole; the first request warms up."""
    seconds, tokens = [], []
    for number in range(requests + 1):
        question = f"What is {10 + number % 80} plus {17 + number * 7 % 70}?"
        started = time.perf_counter()
        held, used = None, 0
        for chunk in streamed(server, [{"role": "user", "content": question}]):
            used = (chunk.get("usage") or {}).get("completion_tokens", used)
            if held is None and chunk["call"]:
                held = time.perf_counter() - started
        if held is None:
            raise RuntimeError(f"{question}: no call in {used} tokens")
        seconds.append(held)
        tokens.append(used)
    seconds, tokens = seconds[1:], tokens[1:]
    return {
        "mean, ms": round(statistics.mean(seconds) * 1e3, 1),
        "p95, ms": round(statistics.quantiles(seconds, n=20)[-1] * 1e3, 1),
        "tokens of an answer, mean": round(statistics.mean(tokens), 1),
    }


def loop(server: Server) -> list[dict[str, int]]:
    """One conversation: a question, and the model's answer or its calls' results, `TURNS` times."""
    messages: list[dict[str, Any]] = []
    rows, before = [], 0
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"What is {11 + turn} plus {30 + turn}?"})
        said: dict[str, Any] = {}
        for chunk in streamed(server, messages, max_tokens=64):
            said = chunk["said"]
            usage = chunk.get("usage") or {}
        messages.append(said)
        messages += [
            {"role": "tool", "tool_call_id": call["id"], "content": "41"} for call in said.get("tool_calls", ())
        ]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        rows.append(
            {
                "turn": turn,
                "prompt tokens": usage["prompt_tokens"],
                "not seen before": usage["prompt_tokens"] - before,
                "prefilled": usage["prompt_tokens"] - cached,
            }
        )
        before = usage["prompt_tokens"] + usage["completion_tokens"]
    return rows


def streamed(server: Server, messages: list[dict[str, Any]], max_tokens: int = 256) -> Any:
    """Chunks, each with the message as far as it has come (`said`), and whether it has a complete call (`call`)."""
    request = {
        "model": server.http.get("/v1/models").json()["data"][0]["id"],
        "messages": messages,
        "tools": TOOLS,
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        # The reasoning of earlier turns stays where it was, so that a prompt begins with all of the one before.
        "chat_template_kwargs": {"save_history_reasoning_content": True},
    }
    said: dict[str, Any] = {"role": "assistant", "content": ""}
    complete = False
    with server.http.stream("POST", "/v1/chat/completions", json=request) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            for choice in chunk["choices"]:
                complete = _extend(said, choice["delta"]) or complete
            yield chunk | {"said": said, "call": complete}


def _extend(said: dict[str, Any], delta: dict[str, Any]) -> bool:
    """Whether a call's arguments have become whole."""
    for field in ("content", "reasoning", "reasoning_content"):
        if delta.get(field):
            said[field] = said.get(field, "") + delta[field]
    for part in delta.get("tool_calls") or ():
        calls = said.setdefault("tool_calls", [])
        if part["function"].get("name"):
            calls.append(
                {"id": part["id"], "type": "function", "function": {"name": part["function"]["name"], "arguments": ""}}
            )
        calls[part["index"]]["function"]["arguments"] += part["function"].get("arguments") or ""
        with suppress(ValueError):
            json.loads(calls[part["index"]]["function"]["arguments"])
            return True
    return False


if __name__ == "__main__":
    typer.run(main)
