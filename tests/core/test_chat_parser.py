"""What the parser makes of outputs as models write them: as documented, and not."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_core.chat.events import ArgumentsDelta, CallEnd, CallStart, ContentDelta, Message
from longcat_core.chat.json_text import JsonText
from longcat_core.chat.parser import ChatParser, parse
from longcat_core.chat.prompt import Phase
from longcat_core.chat.tools import Tool

WEATHER = Tool(
    "get_weather",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "where": {"type": "object"}},
    },
)
TIME = Tool("get_time", {"type": "object", "properties": {}})
TOOLS = (WEATHER, TIME)
PARIS = ("get_weather", {"city": "Paris"})

XML = (
    "<longcat_tool_call>get_weather\n<longcat_arg_key>city</longcat_arg_key>\n"
    "<longcat_arg_value>Paris</longcat_arg_value>\n</longcat_tool_call>"
)
JSON = '<longcat_tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</longcat_tool_call>'


def calls(output: str, tools: tuple[Tool, ...] = TOOLS) -> list[tuple[str, Any]]:
    """Names and arguments, if all calls are complete and there is nothing else."""
    message = parse(output, tools)
    assert (message.reasoning, message.content) == ("", ""), message
    assert all(call.complete for call in message.calls), message
    return [(call.name, json.loads(call.arguments)) for call in message.calls]


def value_of(written: str, schema: Any, **rest: Any) -> Any:
    """The argument that a value of the XML form becomes by a schema."""
    tool = Tool("f", {"type": "object", "properties": {"x": schema}, **rest})
    output = f"<longcat_tool_call>f\n<longcat_arg_key>x</longcat_arg_key>\n<longcat_arg_value>{written}"
    return calls(f"{output}</longcat_arg_value>\n</longcat_tool_call>\n", (tool,))[0][1]["x"]


def test_an_output_of_thinking_2601_is_reasoning_content_and_parallel_calls() -> None:
    output = f"Two places.\n\nBoth.\n</longcat_think>\nI look.\n\n{XML}\n{XML}\n</longcat_s>"
    message = parse(output, TOOLS, Phase.INSIDE)
    assert (message.reasoning, message.content) == ("Two places.\n\nBoth.", "I look.\n\n")
    assert [(call.name, json.loads(call.arguments)) for call in message.calls] == [PARIS, PARIS]


def test_an_output_of_chat_is_content_and_calls_without_separator() -> None:
    message = parse(f"I look.{JSON}{JSON}Wait.", TOOLS)
    assert message.content == "I look.Wait."
    assert [(call.name, json.loads(call.arguments)) for call in message.calls] == [PARIS, PARIS]


@pytest.mark.parametrize("phase", Phase)
def test_the_tag_that_opens_reasoning_may_be_in_the_prompt_or_in_the_output_or_in_both(phase: Phase) -> None:
    for opening in ("", "\n") if phase is Phase.OPENED else ("",) if phase.is_open else ():
        assert parse(f"{opening}why\n</longcat_think>\nso", phase=phase) == said("why", "so")
    assert parse("<longcat_think>\nwhy\n</longcat_think>\nso", phase=phase) == said("why", "so")


def said(reasoning: str, content: str) -> Message:
    return Message(reasoning, content, ())


def test_one_line_end_is_the_formats_and_the_others_are_the_models() -> None:
    assert parse("<longcat_think>\n\n a \n\n</longcat_think>\n\n b\n") == said("\n a \n", "\n b\n")
    assert parse("<longcat_think>a</longcat_think>b") == said("a", "b")
    assert parse("<longcat_think>\n</longcat_think>\nb") == said("", "b")


def test_reasoning_that_is_not_over_is_reasoning() -> None:
    assert parse("<longcat_think>\na\n") == said("a\n", "")


def test_reasoning_may_come_again() -> None:
    output = "<longcat_think>a</longcat_think>b<longcat_think>c</longcat_think>d"
    assert parse(output) == said("ac", "bd")


@pytest.mark.parametrize("call", [XML, JSON], ids=["xml", "json"])
def test_a_call_ends_reasoning_whose_end_tag_is_missing(call: str) -> None:
    message = parse(f"<longcat_think>\nI look.\n{call}", TOOLS)
    assert (message.reasoning, message.content, len(message.calls)) == ("I look.", "", 1)


def test_a_calls_tag_that_reasoning_talks_about_is_reasoning() -> None:
    thought = "I could write <longcat_tool_call> or `<longcat_tool_call>`, but"
    assert parse(f"<longcat_think>{thought}</longcat_think>no") == said(thought, "no")


def test_a_lone_end_of_reasoning_says_nothing() -> None:
    assert parse("</longcat_think>\nso") == said("", "so")


def test_spaces_alone_beside_a_tag_are_layout_and_all_other_spaces_are_content() -> None:
    assert parse(f" \n{XML}\n \n{XML} \n", TOOLS).content == ""
    assert parse(f" a {XML}\n b \n", TOOLS).content == " a  b \n"
    assert parse(" \n").content == " \n"


@pytest.mark.parametrize("end", ["", "\n", "\n</longcat_tool_call>", "</longcat_tool_call>"])
@pytest.mark.parametrize("head", ["get_time", "get_time\n", "functions.get_time", "get_time()", "get_time({})"])
def test_a_call_without_arguments_needs_neither_line_end_nor_end_tag(head: str, end: str) -> None:
    assert calls(f"<longcat_tool_call>{head}{end}") == [("get_time", {})]


@pytest.mark.parametrize(
    "body",
    [
        "get_weather<longcat_arg_key>city</longcat_arg_key><longcat_arg_value>Paris</longcat_arg_value>",
        "\n get_weather \n\n<longcat_arg_key> city </longcat_arg_key> <longcat_arg_value>Paris</longcat_arg_value>\n",
        "functions.get_weather\n<longcat_arg_key>city</longcat_arg_key>\n<longcat_arg_value>Paris</longcat_arg_value>\n",
        "get_weather\n<longcat_arg_key>city\n<longcat_arg_value>Paris</longcat_arg_value>\n",
        "get_weather\n<longcat_arg_key>city <longcat_arg_value>Paris",
        "get_weather\n<longcat_arg_key>city</longcat_arg_key>\nParis</longcat_arg_value>\n",
        "get_weather\n<longcat_arg_key>city</longcat_arg_key>\n<longcat_arg_value>Paris</longcat_arg_key>\n",
        "get_weather\n<longcat_arg_key>city</longcat_arg_key>\n<longcat_arg_value>Paris<longcat_arg_value>\n",
        "get_weather\n<longcat_arg_key>city</longcat_arg_value>\n<longcat_arg_value>Paris\n",
        'get_weather\n<longcat_arg_key>{"city": "Paris"}</longcat_arg_key>\n',
        'get_weather\n<longcat_arg_key>{"city": "Paris"}',
        'get_weather\n{"city": "Paris"}\n',
        'functions.get_weather({"city": "Paris"})',
        '{"name": "get_weather", "arguments": {"city": "Paris"}}',
        '{"name": "functions.get_weather", "arguments": {"city": "Paris"}}',
        '{"arguments":{"city":"Paris"},"name":"get_weather"}',
        '{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}, "id": [1, {"a": 2}]}',
        '{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}',
        '{"name": "get_weather", "arguments": {"city": "Paris"}',
        '{"name": "get_weather", "arguments": {"city": "Paris"}}}',
        '{"name": "get_weather", "arguments": {"city": "Paris"},}',
    ],
)
def test_calls_as_models_deviate_are_read(body: str) -> None:
    call = f"<longcat_tool_call>{body}</longcat_tool_call>"
    assert calls(call) == [PARIS]
    assert calls(f"{call}\n{XML}\n") == [PARIS, PARIS]


@pytest.mark.parametrize("call", [XML, JSON], ids=["xml", "json"])
def test_a_call_without_end_tag_is_over_at_the_end_or_at_the_next_call(call: str) -> None:
    cut = call.removesuffix("</longcat_tool_call>")
    assert calls(cut) == [PARIS]
    assert calls(f"{cut}{cut}{call}") == [PARIS] * 3


def test_a_value_that_is_not_closed_ends_where_a_key_of_the_schema_begins() -> None:
    output = "<longcat_tool_call>get_weather\n<longcat_arg_key>city</longcat_arg_key>\n<longcat_arg_value>Paris\n"
    output += "<longcat_arg_key>days</longcat_arg_key>\n<longcat_arg_value>3</longcat_arg_value>\n</longcat_tool_call>"
    assert calls(output) == [("get_weather", {"city": "Paris", "days": 3})]


@pytest.mark.parametrize("nothing", ["null", '""', "{}"])
def test_json_arguments_that_are_nothing_are_an_empty_object(nothing: str) -> None:
    assert calls(f'<longcat_tool_call>{{"name": "get_time", "arguments": {nothing}}}') == [("get_time", {})]
    assert calls('<longcat_tool_call>{"name": "get_time"}</longcat_tool_call>') == [("get_time", {})]


def test_a_name_alone_is_a_call_whose_last_bracket_may_be_missing_however_it_is_cut() -> None:
    parser = ChatParser(TOOLS)
    events = [
        event for piece in '<longcat_tool_call>{"name": "get_time"</longcat_tool_call>' for event in parser.feed(piece)
    ]
    assert events == [CallStart(0, "get_time"), ArgumentsDelta(0, "{}"), CallEnd(0, True)]


def test_a_key_in_a_value_is_of_the_value_if_it_was_given_or_is_none_of_the_schema() -> None:
    pair = "<longcat_arg_key>days</longcat_arg_key>\n<longcat_arg_value>3</longcat_arg_value>\n"
    for text in ("<longcat_arg_key>days</longcat_arg_key>", "<longcat_arg_key>other</longcat_arg_key>"):
        assert calls(XML.replace("Paris", text).replace("get_weather\n", f"get_weather\n{pair}"))[0][1]["city"] == text
    text = "a <longcat_arg_key>days"
    assert calls(XML.replace("Paris", text))[0][1]["city"] == text


def test_a_tool_that_the_request_does_not_have_is_called_all_the_same() -> None:
    for call in (XML, JSON):
        assert calls(call, ()) == [PARIS]
        assert calls(call.replace("get_weather", "functions.get_weather"), ())[0][0] == "functions.get_weather"
    assert calls("<longcat_tool_call>other</longcat_tool_call>") == [("other", {})]


@pytest.mark.parametrize(
    "output",
    [
        "<longcat_tool_call> is the tag that begins a call.",
        "<longcat_tool_call>prose, not a name</longcat_tool_call>",
        "<longcat_tool_call>next_state: MANAGE_PAGES</longcat_arg_value>\n",
        "<longcat_tool_call>word\nand more",
        '<longcat_tool_call>\n{"name": 1, "arguments": {}}\n</longcat_tool_call>',
        '<longcat_tool_call>\n{"arguments": {"name": "get_weather"}}\n</longcat_tool_call>',
        '<longcat_tool_call>\n{"arguments": [1], "name": "get_weather"}\n</longcat_tool_call>',
        "<longcat_tool_call>\n{name: get_weather}\n</longcat_tool_call>",
        '<longcat_tool_call>\n{"name": "get_wea',
        "<longcat_tool_call>\n[1]\n</longcat_tool_call>",
        " \n<longcat_tool_call>",
        "a </longcat_tool_call> b",
        "<longcat_tool_call>" + "x" * 300,
    ],
)
def test_what_is_no_call_is_text_to_the_letter(output: str) -> None:
    assert parse(output, TOOLS) == said("", output)


def test_a_call_after_what_is_no_call_is_read() -> None:
    message = parse(f"<longcat_tool_call>no, that is wrong\n{XML}", TOOLS)
    assert (message.content, len(message.calls)) == ("<longcat_tool_call>no, that is wrong\n", 1)


def test_arguments_that_stop_being_json_end_incomplete_and_the_rest_is_text() -> None:
    message = parse(
        '<longcat_tool_call>{"name": "get_weather", "arguments": {"city": "P"a"}}</longcat_tool_call>!', TOOLS
    )
    (call,) = message.calls
    assert (call.arguments, call.complete, message.content) == ('{"city": "P"', False, 'a"}}!')


def test_arguments_that_the_end_of_the_output_cuts_are_incomplete_and_not_closed() -> None:
    for output in (
        '<longcat_tool_call>{"name": "get_weather", "arguments": {"city": "Par',
        "<longcat_tool_call>get_weather\n<longcat_arg_key>city</longcat_arg_key>\n<longcat_arg_value>Par</longcat_arg_va",
    ):
        message = parse(output, TOOLS)
        assert message.calls[0].arguments == '{"city": "Par'
        assert (message.calls[0].complete, message.content) == (False, "")


def test_a_tag_that_the_end_of_the_output_cuts_is_left_out_and_other_text_is_not() -> None:
    assert parse("a <longcat_tool_ca").content == "a "
    assert parse("a </longcat_th").content == "a "
    assert parse("a </long").content == "a </long"
    assert parse("a <").content == "a <"


def test_tags_in_strings_are_of_the_strings() -> None:
    value = 'a <longcat_tool_call> </longcat_tool_call> </longcat_arg_value> b <longcat_arg_key> </longcat_think> "\\n'
    json_call = json.dumps({"name": "get_weather", "arguments": {"city": value}})
    assert calls(f"<longcat_tool_call>{json_call}</longcat_tool_call>")[0][1] == {"city": value}
    assert calls(XML.replace("Paris", value))[0][1] == {"city": value}


def test_line_ends_that_a_json_string_must_not_have_become_escapes() -> None:
    output = '<longcat_tool_call>{"name": "get_weather", "arguments": {"city": "a\n\tb\x01"}}</longcat_tool_call>'
    assert calls(output)[0][1] == {"city": "a\n\tb\x01"}


@pytest.mark.parametrize(
    "written", ["101", " 101 ", "true", "null", '"quoted"', "{}", "  x\n", "\n", "", "é\\n", "1 < 2"]
)
def test_a_string_is_raw_to_the_last_space(written: str) -> None:
    for schema in (
        {"type": "string"},
        {"enum": ["101", "a"]},
        {"$ref": "#/$defs/S"},
        {"anyOf": [{"type": "string"}, {"const": "a"}]},
        {"allOf": [{"type": ["string", "integer"]}, {"type": "string"}]},
    ):
        assert value_of(written, schema, **{"$defs": {"S": {"type": "string"}}}) == written


@pytest.mark.parametrize(
    ("schema", "written", "wanted"),
    [
        ({"type": "integer"}, "7", 7),
        ({"type": "integer"}, "\n7\n", 7),
        ({"type": "integer"}, "seven", "seven"),
        ({"type": "integer"}, "", ""),
        ({"type": "integer"}, "007", "007"),
        ({"type": "number"}, "-1.5e3", -1500.0),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "null"}, "None", None),
        ({"type": "array", "items": {"type": "string"}}, '["101", "a"]', ["101", "a"]),
        ({"type": "array"}, "a, b", "a, b"),
        ({"type": "array"}, "[see below]", "[see below]"),
        ({"type": "array"}, "['a']", "['a']"),
        ({"type": "object"}, '{"a": {"b": ["c", null]}}', {"a": {"b": ["c", None]}}),
        ({"type": "object"}, ' {"a": "}"} ', {"a": "}"}),
        ({"type": "object"}, "{", "{"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "None", "None"),
        ({"type": "string", "nullable": True}, "null", None),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "7", 7),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "7 days", "7 days"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "true", "true"),
        ({"oneOf": [{"type": "string"}, {"type": "object"}]}, '{"a": 1}', {"a": 1}),
        ({"oneOf": [{"type": "string"}, {"type": "object"}]}, "{a}", "{a}"),
        ({"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}, "7", 7),
        ({"enum": [1, 2]}, "2", 2),
        ({"const": True}, "true", True),
        ({}, "7", 7),
        ({}, "word", "word"),
        ({}, " word ", " word "),
        (True, "[1]", [1]),
        ({"$ref": "#/$defs/Self"}, "7", 7),
        ({"$ref": "#/nowhere"}, "7", 7),
    ],
)
def test_a_value_is_typed_by_its_schema(schema: Any, written: str, wanted: Any) -> None:
    definitions = {"N": {"type": "integer"}, "Self": {"$ref": "#/$defs/Self"}}
    got = value_of(written, schema, **{"$defs": definitions})
    assert (got, type(got)) == (wanted, type(wanted))


def test_an_argument_is_found_wherever_the_schema_has_it() -> None:
    text = {"properties": {"x": {"type": "string"}}}
    pair = "<longcat_arg_key>x</longcat_arg_key>\n<longcat_arg_value>1</longcat_arg_value>\n"
    for schema in (
        {"allOf": [{"required": ["x"]}, text]},
        {"anyOf": [text, {"properties": {"y": {"type": "integer"}}}]},
        {"$ref": "#/$defs/A", "$defs": {"A": text}},
        {"additionalProperties": {"type": "string"}},
        {"patternProperties": {"^x": {"type": "string"}}},
    ):
        assert calls(f"<longcat_tool_call>f\n{pair}</longcat_tool_call>", (Tool("f", schema),)) == [("f", {"x": "1"})]


def test_a_long_value_is_given_while_it_comes_and_a_short_one_when_it_is_known() -> None:
    parser = ChatParser(TOOLS)
    parser.feed("<longcat_tool_call>get_weather\n<longcat_arg_key>where</longcat_arg_key>\n<longcat_arg_value>")
    assert parser.feed("[") == []  # it may be prose
    parser = ChatParser(TOOLS)
    parser.feed("<longcat_tool_call>get_weather\n<longcat_arg_key>where</longcat_arg_key>\n<longcat_arg_value>")
    assert parser.feed('{"a": [1, 2') == [ArgumentsDelta(0, '{"a": [1, ')]  # 2 may be 25
    assert parser.feed("]}") == [ArgumentsDelta(0, "2]}")]
    assert parser.feed("</longcat_arg_value>\n</longcat_tool_call>") == [ArgumentsDelta(0, "}"), CallEnd(0, True)]


def test_a_value_that_may_be_a_number_is_held_while_it_looks_like_one() -> None:
    parser = ChatParser((Tool("f", {"properties": {"x": {"type": ["integer", "string"]}}}),))
    parser.feed("<longcat_tool_call>f\n<longcat_arg_key>x</longcat_arg_key>\n<longcat_arg_value>")
    assert parser.feed("7 ") == []
    assert parser.feed("days") == [ArgumentsDelta(0, '"7 days')]


def test_text_before_the_first_argument_is_content() -> None:
    message = parse(XML.replace("get_weather\n", "get_weather\nwith these:\n"), TOOLS)
    assert (message.content, message.calls[0].complete) == ("with these:\n", True)


def test_pieces_of_one_kind_are_one_event() -> None:
    events = ChatParser(TOOLS).feed(f"a </b {JSON}c")
    assert events == [
        ContentDelta("a </b "),
        CallStart(0, "get_weather"),
        ArgumentsDelta(0, '{"city": "Paris"}'),
        CallEnd(0, True),
        ContentDelta("c"),
    ]


_JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(_JSON_VALUES, st.sampled_from([None, 1]), st.booleans(), st.integers(1, 9))
def test_every_json_value_is_read_and_given_back_unchanged(
    value: Any, indent: int | None, ascii: bool, size: int
) -> None:
    written = json.dumps(value, indent=indent, ensure_ascii=ascii)
    reader, valid = JsonText(), list[str]()
    for at in range(0, len(written), size):
        reader.read(written[at : at + size], 0, valid)
    reader.finish(valid)
    assert (reader.done, "".join(valid)) == (True, written)


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from('{}[]":,\\u0129eE+-.truefalsn \n'), max_size=12), st.integers(1, 4))
def test_json_is_what_pythons_parser_says(written: str, size: int) -> None:
    reader, valid = JsonText(), list[str]()
    rest = ""
    for at in range(0, len(written), size):
        piece = written[at : at + size]
        rest += piece[reader.read(piece, 0, valid) :]
    reader.finish(valid)
    try:
        json.loads(written, strict=False)
        is_json = True
    except ValueError:
        is_json = False
    assert (reader.done and not rest.strip(" \t\n\r")) == is_json, (valid, rest)
