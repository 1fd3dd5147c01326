"""CPU time that the parser of reasoning and tool calls takes for a token, by the length of a call's arguments.

A token is a tag, or four characters at most, and comes alone, as in a stream that is not late. What an engine does for
a token (detokenising, the chunk as JSON) is not in it.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
import statistics
import time

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import record
from longcat_core.chat.events import gather
from longcat_core.chat.parser import ChatParser
from longcat_core.chat.tools import Tool

SIZES = (1_000, 10_000, 100_000, 1_000_000)
TOOL = Tool("edit", {"type": "object", "properties": {"code": {"type": "string"}, "rows": {"type": "array"}}})
_TOKEN = re.compile(r"</?longcat_[a-z_]+>|[\s\S](?:(?!</?longcat_)[\s\S]){0,3}")
_LINE = '    if row["name"] != "naïve\\t" and not seen:\n        return f"{row!r}"\n'


def outputs(size: int) -> dict[str, str]:
    """By what they are: outputs that are `size` characters long, but for the tags."""
    code = (_LINE * (size // len(_LINE) + 1))[:size]
    rows = [{"id": i, "share": i / 8, "name": None} for i in range(size // 40)]
    xml = "<longcat_tool_call>edit\n<longcat_arg_key>{}</longcat_arg_key>\n<longcat_arg_value>{}</longcat_arg_value>\n"
    return {
        "content": code,
        "reasoning": f"<longcat_think>\n{code}\n</longcat_think>\nSo.",
        "JSON, code": _json({"code": code}),
        "JSON, rows": _json({"rows": rows}),
        "XML, code": xml.format("code", code) + "</longcat_tool_call>",
        "XML, rows": xml.format("rows", json.dumps(rows)) + "</longcat_tool_call>",
    }


def _json(arguments: object) -> str:
    call = json.dumps({"name": TOOL.name, "arguments": arguments}, ensure_ascii=False)
    return f"<longcat_tool_call>\n{call}\n</longcat_tool_call>"


def seconds_a_token(tokens: list[str]) -> float:
    parser, events = ChatParser((TOOL,)), []
    started = time.process_time()
    for token in tokens:
        events += parser.feed(token)
    events += parser.finish()
    taken = time.process_time() - started
    assert all(call.complete for call in gather(events).calls)
    return taken / len(tokens)


def main(repeats: int = 5) -> None:
    rows = []
    for size in SIZES:
        for name, output in outputs(size).items():
            tokens = _TOKEN.findall(output)
            times = [seconds_a_token(tokens) for _ in range(max(repeats, 20_000 // size))]
            microseconds = round(statistics.median(times) * 1e6, 2)
            rows.append({"output": name, "characters": size, "tokens": len(tokens), "us_a_token": microseconds})
    table = Table("output", *(f"{size:,}" for size in SIZES), title="CPU microseconds a token, by characters")
    for name in outputs(1):
        table.add_row(name, *(str(row["us_a_token"]) for row in rows if row["output"] == name))
    Console().print(table)
    print(record.write("chat_parser", rows, repeats=repeats))


if __name__ == "__main__":
    typer.run(main)
