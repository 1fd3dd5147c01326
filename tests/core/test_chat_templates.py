"""The chat templates: what they write is what is published, and the parser reads back what they write."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from longcat_core.chat.parser import parse
from longcat_core.chat.prompt import Phase, phase_of
from longcat_core.chat.templates import CHAT, TEMPLATES, THINKING, THINKING_2601, Form, Template, choose, form_of
from longcat_core.chat.tools import Tool

ADD = {
    "type": "function",
    "function": {
        "name": "func_add",
        "description": "Calculate the sum of two numbers",
        "parameters": {"type": "object", "properties": {"x1": {"type": "number"}, "note": {"type": "string"}}},
    },
}
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]


def render(template: Template, messages: list[dict[str, Any]], **options: Any) -> str:
    """As transformers renders, and the engines after it."""
    options = {"add_generation_prompt": True, **options}
    rendered: str = render_jinja_template([messages], chat_template=template.text, **options)[0][0]
    return rendered


def assistant(arguments: Any, **fields: Any) -> dict[str, Any]:
    call = {"type": "function", "id": "c1", "function": {"name": "func_add", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call], **fields}


def test_prompts_are_as_published() -> None:
    assert render(CHAT, ASKED[1:]) == "[Round 0] USER:1 + 1? ASSISTANT:"
    assert render(CHAT, ASKED) == "SYSTEM:Be brief. [Round 0] USER:1 + 1? ASSISTANT:"
    assert render(THINKING, ASKED) == "SYSTEM:Be brief. [Round 0] USER:1 + 1? /think_on ASSISTANT:"
    assert render(THINKING_2601, ASKED) == (
        "<longcat_system>Be brief.<longcat_user>1 + 1? /think_on <longcat_assistant><longcat_think>\n"
    )


def test_later_rounds_are_as_published() -> None:
    said = {"role": "assistant", "reasoning_content": "Simple.", "content": "2"}
    messages = [*ASKED, said, {"role": "user", "content": "Check again?"}]
    assert render(CHAT, messages) == (
        "SYSTEM:Be brief. [Round 0] USER:1 + 1? ASSISTANT:2</longcat_s> [Round 1] USER:Check again? ASSISTANT:"
    )
    assert render(THINKING, messages) == (
        "SYSTEM:Be brief. [Round 0] USER:1 + 1? /think_on ASSISTANT:2 [Round 1] USER:Check again? /think_on ASSISTANT:"
    )
    assert render(THINKING_2601, messages) == (
        "<longcat_system>Be brief.<longcat_user>1 + 1?<longcat_assistant>2</longcat_s>"
        "<longcat_user>Check again? /think_on <longcat_assistant><longcat_think>\n"
    )


@pytest.mark.parametrize("template", [CHAT, THINKING], ids=lambda template: template.name)
def test_tools_are_declared_as_chat_and_thinking_have_it(template: Template) -> None:
    declared, said = render(template, ASKED, tools=[ADD]).split("\n\n## Messages\n")
    assert said == render(template, ASKED)
    call = '<longcat_tool_call>\n{"name": <function-name>, "arguments": <args-dict>}\n</longcat_tool_call>'
    schema = json.dumps(ADD["function"]["parameters"], indent=2)  # type: ignore[index]
    assert declared == (
        "## Tools\nYou have access to the following tools: \n\n### Tool namespace: function\n\n"
        "#### Tool name: func_add\n\nDescription: Calculate the sum of two numbers\n\n"
        f"InputSchema: \n{schema}\n\n"
        "**Note**: For each function call, return a json object with function name and arguments within "
        f"<longcat_tool_call></longcat_tool_call> XML tags as follows:\n{call}\n"
        "When multiple functions need to be called simultaneously, each function call should be wrapped in its own "
        f"<longcat_tool_call> tag and placed consecutively. For example:\n{call}{call}"
    )


def test_tools_are_declared_as_thinking_2601_has_it() -> None:
    pairs = "".join(
        f"<longcat_arg_key>{{arg-key-{i}}}</longcat_arg_key>\n<longcat_arg_value>{{arg-value-{i}}}</longcat_arg_value>\n"
        for i in (1, 2)
    )
    assert render(THINKING_2601, ASKED, tools=[ADD]) == (
        "<longcat_tool_declare>\n# Tools\nYou have access to the following tools:\n\n## Tool namespace: function\n\n"
        "### Tool name: func_add\nDescription: Calculate the sum of two numbers\n\n"
        'InputSchema: {"type": "object", "properties": {"x1": {"type": "number"}, "note": {"type": "string"}}}\n\n'
        "**Note**: For each function call, output the function name and arguments within the following XML format:\n"
        f"<longcat_tool_call>{{function-name}}\n{pairs}...\n</longcat_tool_call>\n</longcat_tool_declare>"
        + render(THINKING_2601, ASKED)
    )


def test_a_call_and_its_result_are_as_thinking_2601_has_it() -> None:
    messages = [*ASKED, assistant({"x1": 1, "note": "a"}, reasoning_content="I add."), {"role": "tool", "content": "2"}]
    assert render(THINKING_2601, messages) == (
        "<longcat_system>Be brief.<longcat_user>1 + 1? /think_on <longcat_assistant><longcat_think>\nI add.\n"
        "</longcat_think>\n<longcat_tool_call>func_add\n"
        "<longcat_arg_key>x1</longcat_arg_key>\n<longcat_arg_value>1</longcat_arg_value>\n"
        "<longcat_arg_key>note</longcat_arg_key>\n<longcat_arg_value>a</longcat_arg_value>\n"
        "</longcat_tool_call>\n</longcat_s><longcat_observation><longcat_tool_response>func_add\n2"
        "</longcat_tool_response> /think_on <longcat_assistant><longcat_think>\n"
    )


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_round_only_grows_so_that_its_beginning_stays_cached(template: Template) -> None:
    messages, prompts = list(ASKED), []
    for turn in range(4):
        prompts.append(render(template, messages))
        messages += [assistant({"x1": turn}, reasoning_content="Hm."), {"role": "tool", "content": f"{turn}"}]
    for earlier, later in pairwise(prompts):
        assert later.startswith(earlier.removesuffix("<longcat_think>\n"))


@pytest.mark.parametrize("template", [THINKING, THINKING_2601], ids=lambda template: template.name)
def test_reasoning_of_earlier_rounds_is_kept_on_request_only(template: Template) -> None:
    said = {"role": "assistant", "reasoning_content": "Simple.", "content": "2"}
    messages = [*ASKED, said, {"role": "user", "content": "Sure?"}]
    assert "Simple." not in render(template, messages)
    kept = render(template, messages, save_history_reasoning_content=True)
    assert "<longcat_think>\nSimple.\n</longcat_think>\n2" in kept
    assert kept.startswith(render(template, ASKED).removesuffix("<longcat_think>\n"))
    assert "Simple." in render(template, [*ASKED, said], add_generation_prompt=False), "this round's stays"


@pytest.mark.parametrize("template", [THINKING, THINKING_2601], ids=lambda template: template.name)
def test_without_thinking_the_prompt_asks_for_none(template: Template) -> None:
    prompt = render(template, ASKED, enable_thinking=False)
    assert "think" not in prompt
    assert phase_of(prompt) is Phase.ANSWER


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_results_are_named_by_their_calls(template: Template) -> None:
    calls = [{"id": f"c{i}", "function": {"name": f"tool_{i}", "arguments": {}}} for i in range(2)]
    head = [*ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]
    by_id = [{"role": "tool", "tool_call_id": f"c{i}", "content": f"r{i}"} for i in (1, 0)]
    in_order = [{"role": "tool", "content": f"r{i}"} for i in (0, 1)]
    named = [{"role": "tool", "name": f"tool_{i}", "tool_call_id": "?", "content": f"r{i}"} for i in (0, 1)]
    for results in (by_id, in_order, named):
        rendered = render(template, head + results)
        for i in range(2):
            assert f"tool_{i}{'' if template.form is Form.XML else ':'}\nr{i}" in rendered


ARGUMENTS = {
    "note": 'a"b\\n\\\n\t é 🐈 \u2028 }{],:/"',
    'k"e:y': {"a": [1, {"b": '}"'}], "c": ""},
    "x1": -1.5,
    "t": True,
    "z": None,
    "e": [],
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize(
    "written",
    [
        ARGUMENTS,
        json.dumps(ARGUMENTS),
        json.dumps(ARGUMENTS, ensure_ascii=False, indent=1),
        json.dumps(ARGUMENTS, separators=(",", ":")).replace("/", "\\/"),
    ],
    ids=["object", "text", "indented", "compact"],
)
def test_what_a_template_writes_of_a_turn_the_parser_reads_back(template: Template, written: Any) -> None:
    turn = assistant(written, content=[{"type": "text", "text": " Let me"}, {"type": "text", "text": " see.\n"}])
    turn["reasoning_content"] = "\nHm. "
    before = render(template, ASKED, add_generation_prompt=False)
    output = render(template, [*ASKED, turn], add_generation_prompt=False).removeprefix(before)
    output = output.partition("<longcat_assistant>" if template.form is Form.XML else "ASSISTANT:")[2]
    message = parse(output, [Tool.read(ADD)])
    assert message.reasoning == ("" if template is CHAT else "\nHm. ")
    assert message.content == " Let me see.\n"
    assert [(call.name, json.loads(call.arguments)) for call in message.calls] == [("func_add", ARGUMENTS)]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("nothing", ["", "{}", " { } ", {}, None])
def test_no_arguments_are_written_in_any_spelling(template: Template, nothing: Any) -> None:
    output = render(template, [*ASKED, assistant(nothing)], add_generation_prompt=False)
    (call,) = parse(output[output.index("<longcat_tool_call>") :]).calls
    assert json.loads(call.arguments) == {}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_content_may_be_parts_of_text_and_nothing_else(template: Template) -> None:
    parts = [{"type": "text", "text": "1 +"}, " 1?"]
    assert render(template, [ASKED[0], {"role": "user", "content": parts}]) == render(template, ASKED)
    with pytest.raises(Exception, match="content of type image_url: wanted text"):
        render(template, [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])
    with pytest.raises(Exception, match="role critic: wanted system"):
        render(template, [{"role": "critic", "content": ""}])


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_prompt_never_ends_with_the_end_token(template: Template) -> None:
    histories = [
        ASKED,
        [*ASKED, assistant({"x1": 1})],
        [*ASKED, assistant({"x1": 1}), {"role": "tool", "content": "2"}],
    ]
    for messages in histories:
        assert not render(template, messages).rstrip().endswith("</longcat_s>")


def test_the_phase_is_told_by_the_prompt() -> None:
    assert phase_of(render(CHAT, ASKED)) is Phase.ANSWER
    assert phase_of(render(THINKING, ASKED)) is Phase.THINK
    assert phase_of(render(THINKING_2601, ASKED)) is Phase.INSIDE
    assert phase_of(render(THINKING_2601, ASKED).rstrip("\n")) is Phase.OPENED
    assert phase_of(render(THINKING_2601, ASKED) + "So far</longcat_think>\nand") is Phase.ANSWER
    assert phase_of(render(CHAT, [{"role": "user", "content": "<longcat_think> is what?"}])) is Phase.ANSWER
    assert phase_of("") is Phase.ANSWER


def test_a_template_is_chosen_by_the_tokens_and_a_form_by_the_template_first() -> None:
    assert choose(set(THINKING_2601.markers)) is THINKING_2601
    assert choose(set(THINKING.markers)) is THINKING
    assert choose(set[str]()) is CHAT
    assert [form_of(template.text, set[str]()) for template in TEMPLATES.values()] == [Form.JSON, Form.JSON, Form.XML]
    assert form_of(None, set(THINKING_2601.markers)) is Form.XML
