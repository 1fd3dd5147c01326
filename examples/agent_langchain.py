"""The agent of `agent.py` in LangChain: python examples/agent_langchain.py http://127.0.0.1:8000/v1 "..." """
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import sys

from agent_tools import FUNCTIONS
from langchain.agents import create_agent
from langchain.messages import AIMessage, ToolMessage
from langchain_openai import ChatOpenAI
from openai import DefaultHttpxClient, OpenAI


def main(url: str, question: str) -> None:
    http = DefaultHttpxClient(trust_env=False)
    model = OpenAI(base_url=url, api_key="none", http_client=http).models.list().data[0].id
    chat = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, streaming=True, http_client=http)
    agent = create_agent(chat, tools=list(FUNCTIONS))
    for update in agent.stream({"messages": [("user", question)]}, stream_mode="updates"):
        for message in (message for step in update.values() for message in step["messages"]):
            match message:
                case AIMessage(tool_calls=[_, *_] as calls):
                    print(*(f"{call['name']} {call['args']}" for call in calls), sep="\n")
                case AIMessage(content=answer):
                    print(answer)
                case ToolMessage(name=name, content=result):
                    print(f"{name} gives {result}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} URL QUESTION")
    main(*sys.argv[1:])
