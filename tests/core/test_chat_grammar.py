"""Grammars of LongCat's calls: what XGrammar lets pass is a call that the parser reads and that fits its schema."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from random import Random
from typing import Any

import jsonschema
import numpy as np
import pytest
import xgrammar
from xgrammar import Grammar, GrammarCompiler, GrammarMatcher, StructuralTag, TokenizerInfo, VocabType

from longcat_core.chat.events import Message
from longcat_core.chat.grammar import Choice, Request, structural_tag
from longcat_core.chat.parser import parse
from longcat_core.chat.prompt import Phase
from longcat_core.chat.templates import THINKING_2601, Form
from longcat_core.chat.tools import Tool
from tests.conversations import TOOLS as CONVERSATION_TOOLS
from tests.conversations import xml_call

SCHEMA: dict[str, Any] = {
    "type": "object",
    "$defs": {
        "Unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "Node": {"type": "object", "properties": {"unit": {"$ref": "#/$defs/Unit"}}, "required": ["unit"]},
    },
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"$ref": "#/$defs/Unit"},
        "maybe": {"anyOf": [{"type": "string", "enum": ["x", "y"]}, {"type": "null"}]},
        "node": {"$ref": "#/$defs/Node"},
        "code": {"type": "string", "pattern": "^[a-z]{2}[0-9]?$"},
        "short": {"type": "string", "minLength": 2, "maxLength": 3},
        "rows": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        "flag": {"type": ["boolean", "null"]},
    },
    "required": ["city", "days", "node"],
    "additionalProperties": False,
}
WEATHER, TIME, FREE = Tool("weather", SCHEMA, strict=True), Tool("get.time", {"properties": {}}), Tool("free")
TOOLS = (WEATHER, TIME, FREE)

_CHARACTERS = [*map(chr, range(128)), "é", "龙", "🐈"]
"""Whole ones: of bytes, XGrammar 0.2.7 lets some pass that are no character, and count as several when decoded."""
_VOCABULARY = [text.encode() for text in ("</longcat_s>", *_CHARACTERS, *THINKING_2601.markers)]
_FIRST_MARKER = 1 + len(_CHARACTERS)
_ENDS = np.isin(
    np.arange(len(_VOCABULARY)), [0, *range(_FIRST_MARKER, len(_VOCABULARY)), *(1 + ord(mark) for mark in '"}],')]
)
"""Tokens that end something, or lead there."""
_TOKENIZER = TokenizerInfo(_VOCABULARY, vocab_type=VocabType.RAW, stop_token_ids=[0])


def accepts(tag: dict[str, Any], text: str) -> bool:
    matcher = GrammarMatcher(GrammarCompiler(_TOKENIZER).compile_structural_tag(json.dumps(tag)))
    return matcher.accept_string(text) and matcher.accept_token(0)


def sample(matcher: GrammarMatcher, random: Random) -> str:
    """An output as a model of random weights writes it under the grammar, that hastens to the ends of what it began."""
    mask = xgrammar.allocate_token_bitmask(1, len(_VOCABULARY))
    output: list[bytes] = []
    while not matcher.is_terminated():
        matcher.fill_next_token_bitmask(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")[: len(_VOCABULARY)])
        hasty = allowed[_ENDS[allowed]]
        token = int(random.choice(hasty if len(hasty) and random.random() < 0.6 else allowed))
        assert matcher.accept_token(token)
        output.append(_VOCABULARY[token] if token else b"")
        assert len(output) < 5_000, "no end in sight"
    return b"".join(output).decode()


def samples(request: Request, form: Form, tries: int) -> list[Message]:
    compiled = GrammarCompiler(_TOKENIZER).compile_structural_tag(json.dumps(structural_tag(request, form)))
    outputs = [sample(GrammarMatcher(compiled), Random(seed)) for seed in range(tries)]
    return [parse(output, request.tools) for output in outputs]


def fits(message: Message) -> bool:
    for call in message.calls:
        (tool,) = (tool for tool in TOOLS if tool.name == call.name)
        assert call.complete, call
        jsonschema.validate(json.loads(call.arguments), dict(tool.parameters or {"type": "object"}))
    return bool(message.calls) and message.content == message.reasoning == ""


@pytest.mark.parametrize("form", Form)
def test_where_a_call_is_required_there_are_only_calls_that_fit(form: Form) -> None:
    messages = samples(Request(TOOLS, Choice.REQUIRED), form, tries=200)
    assert all(fits(message) for message in messages)
    assert {call.name for message in messages for call in message.calls} == {"weather", "get.time", "free"}
    assert any(len(message.calls) > 1 for message in messages)


@pytest.mark.parametrize("form", Form)
def test_where_one_function_is_named_it_is_called_once(form: Form) -> None:
    for message in samples(Request(TOOLS, "weather"), form, tries=100):
        assert fits(message)
        assert [call.name for call in message.calls] == ["weather"]


@pytest.mark.parametrize("form", Form)
def test_one_call_is_all_where_parallel_calls_are_refused(form: Form) -> None:
    assert {len(m.calls) for m in samples(Request(TOOLS, Choice.REQUIRED, parallel=False), form, tries=50)} == {1}


def json_call(name: str, arguments: str) -> str:
    return f'<longcat_tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</longcat_tool_call>'


def test_a_request_may_leave_the_choice_and_then_text_is_free_and_strict_tools_are_strict() -> None:
    good, bad = '{"city": "a", "days": 3, "node": {"unit": "celsius"}}', '{"city": 1}'
    tag = structural_tag(Request((WEATHER, Tool("loose", SCHEMA)), Choice.AUTO), Form.JSON)
    assert accepts(tag, "Just text.")
    assert accepts(tag, f"Now {json_call('weather', good)} and {json_call('loose', bad)}.")
    assert not accepts(tag, json_call("weather", bad))
    assert not accepts(tag, json_call("other", "{}"))
    tag = structural_tag(Request((WEATHER, Tool("loose", SCHEMA)), Choice.AUTO), Form.XML)
    assert accepts(tag, "a " + xml_call(Tool("loose"), {"days": "x"}) + "\n b")
    assert not accepts(tag, xml_call(WEATHER, {"days": "x"}))
    assert accepts(tag, xml_call(WEATHER, {"city": "Köln <b>\n ", "days": 3, "node": {"unit": "celsius"}}))


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("phase", [Phase.THINK, Phase.OPENED, Phase.INSIDE])
def test_reasoning_goes_before_where_the_grammar_has_to_let_it_pass(form: Form, phase: Phase) -> None:
    tag = structural_tag(Request((TIME,), Choice.REQUIRED), form, phase)
    call = xml_call(TIME, {}) if form is Form.XML else json_call("get.time", "{}")
    opening = "" if phase.is_open else "<longcat_think>"
    assert accepts(tag, f"{opening}\nwhy\n</longcat_think>\n{call}")
    assert not accepts(tag, call)


def test_a_line_end_may_come_before_calls_and_between_those_in_xml() -> None:
    xml, json_ = (structural_tag(Request((TIME,), Choice.REQUIRED), form) for form in (Form.XML, Form.JSON))
    assert accepts(xml, "\n" + xml_call(TIME, {}) + "\n" + xml_call(TIME, {}) + "\n")
    assert accepts(json_, "\n" + json_call("get.time", "{}") * 2)
    assert not accepts(xml, "Well: " + xml_call(TIME, {}))


def test_a_pattern_may_match_anywhere_in_a_string_unless_it_is_anchored() -> None:
    for pattern, fitting, other in (
        ("x[0-9]", "ax1b", "x"),
        ("^x", "xb", "bx"),
        ("x$", "bx", "xb"),
        ("^x$", "x", "xx"),
    ):
        tool = Tool("f", {"properties": {"a": {"type": "string", "pattern": pattern}}})
        tag = structural_tag(Request((tool,), "f"), Form.XML)
        assert accepts(tag, xml_call(tool, {"a": fitting})), pattern
        assert not accepts(tag, xml_call(tool, {"a": other})), pattern


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/A", "$defs": {"A": {"properties": {"a": {"type": "string"}}}}},
        {"anyOf": [{"properties": {"a": {"type": "string"}}}]},
        {"properties": {"a": True}},
        None,
    ],
)
def test_schemas_of_any_kind_have_a_grammar(schema: Any) -> None:
    tool = Tool("f", schema)
    for form in Form:
        tag = structural_tag(Request((tool,), "f"), form)
        StructuralTag.model_validate(tag)
        Grammar.from_structural_tag(json.dumps(tag))
    assert accepts(structural_tag(Request((tool,), "f"), Form.XML), xml_call(tool, {"a": "x"}))


def test_every_choice_has_a_grammar_that_is_plain_json() -> None:
    for form in Form:
        for choice in (*Choice, "get_weather"):
            tag = structural_tag(Request(CONVERSATION_TOOLS, choice), form)
            assert json.loads(json.dumps(tag)) == tag
            Grammar.from_structural_tag(json.dumps(tag))


def test_a_function_that_the_request_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"tool_choice: other, wanted a tool of the request: weather, get\.time, free"):
        structural_tag(Request(TOOLS, "other"), Form.XML)
    with pytest.raises(ValueError, match="tool_choice: required, wanted a tool of the request: none"):
        structural_tag(Request(()), Form.XML)


def test_tools_are_read_in_each_apis_form() -> None:
    function = {"name": "f", "parameters": {"type": "object"}, "strict": True}
    wanted = Tool("f", {"type": "object"}, True)
    assert (
        Tool.read({"type": "function", "function": function}) == Tool.read({"type": "function", **function}) == wanted
    )
    with pytest.raises(ValueError, match="a tool's name: None"):
        Tool.read({"type": "function", "function": {}})
