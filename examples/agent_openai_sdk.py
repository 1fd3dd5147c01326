"""The agent of `agent.py` in OpenAI's Agents SDK: python examples/agent_openai_sdk.py http://127.0.0.1:8000/v1 "?" """
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import asyncio
import sys

from agent_tools import FUNCTIONS
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI, DefaultAsyncHttpxClient


async def main(url: str, question: str) -> None:
    set_tracing_disabled(True)  # traces would go to OpenAI
    client = AsyncOpenAI(base_url=url, api_key="none", http_client=DefaultAsyncHttpxClient(trust_env=False))
    model = OpenAIChatCompletionsModel((await client.models.list()).data[0].id, client)
    tools = [function_tool(function) for function in FUNCTIONS]
    agent = Agent("LongCat", model=model, tools=tools, model_settings=ModelSettings(temperature=0))
    run = Runner.run_streamed(agent, question)
    async for event in run.stream_events():
        if event.type == "run_item_stream_event" and event.name == "tool_called":
            print(event.item.raw_item.name, event.item.raw_item.arguments)
        elif event.type == "run_item_stream_event" and event.name == "tool_output":
            print("gives", event.item.output)
    print(run.final_output)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} URL QUESTION")
    asyncio.run(main(*sys.argv[1:]))
