"""An agent on OpenAI's client: it shows reasoning, calls and answers as they come, from a server of either engine.

vllm serve $(longcat nano --tools) --enable-auto-tool-choice --tool-call-parser longcat --reasoning-parser longcat
python examples/agent.py http://127.0.0.1:8000/v1 "What is 12 plus 30?"
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import sys
from typing import Any

from agent_tools import DECLARED, FUNCTIONS
from openai import DefaultHttpxClient, OpenAI, OpenAIError
from rich.console import Console

MOST_ROUNDS = 8
RUN = {function.__name__: function for function in FUNCTIONS}

console = Console(highlight=False)


def main(url: str, question: str) -> int:
    """Returns the exit status: 0 if the model came to an answer."""
    try:
        with OpenAI(base_url=url, api_key="none", http_client=DefaultHttpxClient(trust_env=False)) as client:
            answer(client, question)
    except (OpenAIError, RuntimeError) as error:
        console.print(f"{url}: {error}", style="red", markup=False)
        return 1
    return 0


def answer(client: OpenAI, question: str) -> None:
    """Print all that is said and done until the model answers.

    Raises:
        RuntimeError: if it does not.
    """
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(MOST_ROUNDS):
        message = said(client, model, messages)
        messages.append(message)
        if "tool_calls" not in message:
            return
        messages += [result_of(call) for call in message["tool_calls"]]
    raise RuntimeError(f"no answer after {MOST_ROUNDS} rounds")


def said(client: OpenAI, model: str, messages: list[Any]) -> dict[str, Any]:
    """Print what the model says as it comes, and return it as a message of the conversation."""
    stream = client.chat.completions.create(model=model, messages=messages, tools=DECLARED, stream=True, temperature=0)
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls: list[dict[str, Any]] = []
    for delta in (choice.delta for chunk in stream for choice in chunk.choices):
        for field in ("reasoning", "reasoning_content"):  # vLLM's name, and SGLang's
            if text := getattr(delta, field, None):
                message[field] = message.get(field, "") + text
                console.print(text, style="dim", end="", markup=False)
        if delta.content:
            if not message["content"] and len(message) > 2:
                console.print()  # behind reasoning
            message["content"] += delta.content
            console.print(delta.content, end="", markup=False)
        for part in delta.tool_calls or []:
            assert part.function is not None
            if part.function.name:
                function = {"name": part.function.name, "arguments": ""}
                calls.append({"id": part.id, "type": "function", "function": function})
                console.print(f"\n{part.function.name} ", style="bold cyan", end="")
            if part.function.arguments:
                calls[part.index]["function"]["arguments"] += part.function.arguments
                console.print(part.function.arguments, style="cyan", end="", markup=False)
    console.print()
    return message | ({"tool_calls": calls} if calls else {})


def result_of(call: dict[str, Any]) -> dict[str, str]:
    """Run a call, whatever its arguments are, and print and return what comes of it."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    try:
        result = RUN[name](**json.loads(arguments))
    except (KeyError, TypeError, ValueError) as error:
        result = f"Error: {name}({arguments}): {error}"
    console.print(f"{name} gives {result}", style="green", markup=False)
    return {"role": "tool", "tool_call_id": call["id"], "content": result}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} URL QUESTION")
    sys.exit(main(*sys.argv[1:]))
