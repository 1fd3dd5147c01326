"""Tool calls and reasoning through SGLang's own parsers: what was written comes back, streamed or not. No server."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, ToolChoice, ToolChoiceFuncName
from sglang.srt.entrypoints.openai.protocol import Tool as RequestedTool
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.function_call.core_types import ToolCallItem
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.function_call.glm47_moe_detector import Glm47MoeDetector
from sglang.srt.function_call.utils import strip_structural_tag_excludes
from sglang.srt.parser import template_detection, template_manager
from sglang.srt.parser.reasoning_parser import ReasoningParser
from sglang.srt.plugins import load_plugins
from transformers.utils.chat_template_utils import render_jinja_template
from xgrammar import GrammarCompiler, GrammarMatcher, TokenizerInfo, VocabType

from longcat_core.chat.prompt import Phase
from longcat_core.chat.tags import (
    CALL_CLOSE,
    CALL_OPEN,
    END,
    KEY_CLOSE,
    KEY_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    VALUE_CLOSE,
    VALUE_OPEN,
)
from longcat_core.chat.templates import CHAT, TEMPLATES, THINKING, THINKING_2601, Form, Template
from longcat_sglang import registration
from tests.conversations import TOOLS, Conversation, draw
from tests.plugin import python

NAME = "longcat"
CASES = 200
"""Of each form."""
REQUESTED = [
    RequestedTool.model_validate({"function": {"name": tool.name, "parameters": tool.parameters}}) for tool in TOOLS
]


@pytest.fixture(scope="module", autouse=True)
def plugins() -> None:
    load_plugins()


class Tokenizer:
    """What parsers ask of a checkpoint's tokenizer."""

    def __init__(self, template: str | None) -> None:
        self.chat_template = template

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        assert options.pop("tokenize") is False
        rendered: str = render_jinja_template([messages], chat_template=self.chat_template, **options)[0][0]
        return rendered

    def get_vocab(self) -> dict[str, int]:
        return {marker: token for token, marker in enumerate(THINKING_2601.markers)}


OPENED = THINKING_2601.text.replace("<longcat_think>\\n' if enable", "<longcat_think>' if enable")
TOKENIZERS = {
    Phase.ANSWER: Tokenizer(CHAT.text),
    Phase.THINK: Tokenizer(THINKING.text),
    Phase.OPENED: Tokenizer(OPENED),
    Phase.INSIDE: Tokenizer(THINKING_2601.text),
}
"""Checkpoints whose prompts end in each way, where thinking is on."""

Outcome = tuple[str, str, list[tuple[str, str]]]
"""Reasoning, content, names and arguments of calls."""


def parsers(phase: Phase, **options: Any) -> tuple[ReasoningParser, FunctionCallParser]:
    """As SGLang's server makes them for each output."""
    tokenizer = TOKENIZERS[phase]
    reasoning = ReasoningParser(
        NAME, force_reasoning=phase is not Phase.ANSWER, tokenizer=tokenizer, tool_call_parser_active=True, **options
    )
    return reasoning, FunctionCallParser(REQUESTED, NAME, tokenizer=tokenizer)


def unstreamed(output: str, phase: Phase) -> Outcome:
    reasoning_parser, call_parser = parsers(phase, stream_reasoning=False)
    reasoning, rest = reasoning_parser.parse_non_stream(output)
    content, calls = rest, list[ToolCallItem]()
    if call_parser.has_tool_call(rest):
        content, calls = call_parser.parse_non_stream(rest)
    return reasoning or "", content, [(call.name or "", call.parameters) for call in calls]


def streamed(pieces: Iterable[str], phase: Phase, **options: Any) -> Outcome:
    """The last piece also ends the output, as SGLang's last chunk does."""
    reasoning_parser, call_parser = parsers(phase, **options)
    said = ["", ""]
    names: list[str] = []
    arguments: list[str] = []
    pieces = list(pieces)
    for place, piece in enumerate(pieces or [""]):
        is_last = place >= len(pieces) - 1
        reasoning, rest = reasoning_parser.parse_stream_chunk(piece)
        content, calls = "", list[ToolCallItem]()
        if is_last:
            more, last = reasoning_parser.parse_stream_end()
            reasoning, rest = (reasoning or "") + (more or ""), (rest or "") + (last or "")
        content, calls = call_parser.parse_stream_chunk(rest)
        if is_last:
            last, end_calls = call_parser.parse_stream_end()
            content, calls = content + last, [*calls, *end_calls]
        said = [said[0] + (reasoning or ""), said[1] + content]
        for call in calls:
            if call.name is not None:
                assert call.tool_index == len(names)
                names.append(call.name)
                arguments.append("")
            arguments[call.tool_index] += call.parameters
    return said[0], said[1], list(zip(names, arguments, strict=True))


def cut(random: Random, output: str, longest: int) -> list[str]:
    pieces, at = [], 0
    while at < len(output):
        pieces.append(output[at : (at := at + random.randint(1, longest))])
    return pieces


def tokens(output: str) -> list[str]:
    """As a server streams: LongCat's tags are one token each, the rest a few characters a token."""
    pieces, at = [], 0
    while at < len(output):
        tag = next((marker for marker in THINKING_2601.markers if output.startswith(marker, at)), output[at : at + 3])
        cut_at = tag.find("<", 1)
        pieces.append(tag if tag in THINKING_2601.markers or cut_at < 0 else tag[:cut_at])
        at += len(pieces[-1])
    return pieces


def is_meant(case: Conversation, outcome: Outcome) -> bool:
    reasoning, content, calls = outcome
    read = tuple((name, json.loads(arguments)) for name, arguments in calls)
    return (reasoning, content, read) == (case.reasoning, case.content, case.calls)


@pytest.mark.parametrize("form", Form)
def test_what_was_written_comes_back_streamed_and_not(form: Form) -> None:
    for seed in range(CASES):
        random = Random(seed)
        case = draw(random, form)
        whole = unstreamed(case.output, case.phase)
        assert is_meant(case, whole), f"{seed=}\n{case}\n{whole}"
        for pieces in (tokens(case.output), cut(random, case.output, 1 if seed % 10 == 0 else 12)):
            assert "".join(pieces) == case.output
            held = {"stream_reasoning": seed % 3 > 0}
            assert streamed(pieces, case.phase, **held) == whole, f"{seed=}\n{pieces}\n{whole}"


def test_a_name_comes_before_its_arguments_and_these_as_they_are_written() -> None:
    for opening, value in (
        (f'{CALL_OPEN}\n{{"name": "get_weather"', ', "arguments": {"text": "'),
        (f"{CALL_OPEN}get_weather\n", f"{KEY_OPEN}text{KEY_CLOSE}\n{VALUE_OPEN}"),
    ):
        parser = FunctionCallParser(REQUESTED, NAME)
        _, calls = parser.parse_stream_chunk(opening)
        assert calls == [ToolCallItem(tool_index=0, name="get_weather", parameters="")]
        parser.parse_stream_chunk(value)
        given = "".join(call.parameters for _ in range(50) for call in parser.parse_stream_chunk("word ")[1])
        assert len(given) >= len("word " * 50) - 1


def test_reasoning_comes_as_it_is_written_or_all_at_its_end() -> None:
    for streams, expected in ((True, ["Hm", " so", "", ""]), (False, ["", "", "", "Hm so"])):
        parser = ReasoningParser(
            NAME, stream_reasoning=streams, force_reasoning=True, tokenizer=TOKENIZERS[Phase.INSIDE]
        )
        chunks = [parser.parse_stream_chunk(piece) for piece in ("Hm", " so", "\n", f"{THINK_CLOSE}\nYes")]
        assert [reasoning for reasoning, _ in chunks] == expected
        assert chunks[-1][1] == "Yes"


def test_reasoning_without_an_end_is_reasoning_or_becomes_the_answer_on_request() -> None:
    wanted = ChatCompletionRequest(
        model="m",
        messages=[{"role": "user", "content": "?"}],
        chat_template_kwargs={"force_nonempty_content": True},
    )
    for streams in (True, False):
        for request, expected in ((None, ("Hm so", "")), (wanted, ("", "Hm so"))):
            made = {"stream_reasoning": streams, "force_reasoning": True, "request": request}
            assert ReasoningParser(NAME, **made).parse_non_stream("Hm so") == expected
            parser = ReasoningParser(NAME, **made)
            parser.parse_stream_chunk("Hm")
            parser.parse_stream_chunk(" so")
            end = parser.parse_stream_end()
            assert end[1] == expected[1]
            assert request is wanted or end == ("" if streams else "Hm so", "")


@pytest.mark.parametrize(
    ("previous", "reasoning", "content"),
    [
        ("", "on", "So"),
        ("Let me", "on", "So"),
        (f"{THINK_OPEN}\nLet me", "on", "So"),
        (f"Let me\n{THINK_CLOSE}\nThe", "", f"on{THINK_CLOSE}So"),
    ],
)
def test_a_message_is_continued_within_reasoning_or_behind_it(previous: str, reasoning: str, content: str) -> None:
    request = ChatCompletionRequest(
        model="m",
        messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": previous}],
        continue_final_message=True,
    )
    parser = ReasoningParser(NAME, force_reasoning=True, request=request, tokenizer=TOKENIZERS[Phase.INSIDE])
    assert parser.parse_non_stream(f"on{THINK_CLOSE}So") == (reasoning, content)


def test_an_answer_without_reasoning_is_content_where_the_model_opens_it() -> None:
    for phase in (Phase.ANSWER, Phase.THINK):
        assert unstreamed("Yes.", phase) == streamed(["Yes", "."], phase) == ("", "Yes.", [])
        assert unstreamed("<lon", phase) == streamed(["<lon"], phase) == ("", "<lon", [])  # held until the end
    assert unstreamed("Hm.", Phase.INSIDE) == streamed(["Hm", "."], Phase.INSIDE) == ("Hm.", "", [])


def test_a_call_that_is_cut_short_keeps_what_was_written() -> None:
    output = f'Look.{CALL_OPEN}\n{{"name": "get_weather", "arguments": {{"text": "Par'
    whole = ("", "Look.", [("get_weather", '{"text": "Par')])
    assert unstreamed(output, Phase.ANSWER) == streamed(tokens(output), Phase.ANSWER) == whole


def test_tags_without_a_call_are_the_same_streamed_or_not() -> None:
    for output in (f"a {THINK_OPEN}\nb\n{THINK_CLOSE}\nc", f"a{END}", "a <longcat_tool_", "a < b", f"a{CALL_CLOSE}"):
        assert unstreamed(output, Phase.ANSWER) == streamed(tokens(output), Phase.ANSWER)
    assert unstreamed("a <longcat_tool_", Phase.ANSWER) == ("", "a ", [])


# -- the server's methods -------------------------------------------------------------------------------------


def serving(tokenizer: Tokenizer) -> OpenAIServingChat:
    """A chat endpoint with what the methods below ask of it, as its constructor sets it."""
    force, config = template_detection.detect_reasoning_pattern(tokenizer.chat_template)
    endpoint = object.__new__(OpenAIServingChat)
    endpoint.tool_call_parser = endpoint.reasoning_parser = NAME
    endpoint.chat_encoding_spec = None
    endpoint.tokenizer_manager = SimpleNamespace(tokenizer=tokenizer)
    endpoint.template_manager = SimpleNamespace(reasoning_config=config, force_reasoning=force)
    endpoint._reasoning_detector = ReasoningParser(NAME, tokenizer=tokenizer).detector
    return endpoint


def asking(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "?"}], **fields)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda template: template.name)
def test_thinking_is_on_unless_it_is_switched_off(template: Template) -> None:
    endpoint = serving(Tokenizer(template.text))
    thinks = template is not CHAT
    assert endpoint._get_reasoning_from_request(asking()) is thinks
    off = asking(chat_template_kwargs={"enable_thinking": False})
    assert endpoint._get_reasoning_from_request(off) is False
    if thinks:  # as /v1/messages asks for it
        request = asking()
        endpoint.apply_reasoning_enabled(request, False)
        assert endpoint._get_reasoning_from_request(request) is False


def test_a_template_that_sglang_cannot_tell_thinks_by_what_it_writes() -> None:
    template = "{{ messages[0].content }}{% if enable_thinking != false %} /think_on <longcat_assistant>{% endif %}"
    assert template_detection.detect_reasoning_pattern(template) == (False, None)
    assert serving(Tokenizer(template))._get_reasoning_from_request(asking()) is True
    assert serving(Tokenizer(template.replace("!=", "==")))._get_reasoning_from_request(asking()) is False


def test_history_has_reasoning_as_the_template_writes_it() -> None:
    endpoint = serving(TOKENIZERS[Phase.INSIDE])
    assert endpoint.wrap_reasoning_history("Hm") == f"{THINK_OPEN}\nHm\n{THINK_CLOSE}"


def test_tags_stay_in_the_text_for_our_parser_alone() -> None:
    endpoint = serving(TOKENIZERS[Phase.INSIDE])
    for name, kept in ((NAME, True), ("qwen3", False)):
        endpoint.reasoning_parser = name
        request = asking()
        endpoint._patch_reasoning_skip_special_tokens(request)
        assert request.skip_special_tokens is not kept


def test_sglang_still_leaves_special_tokens_out_for_parsers_it_does_not_know() -> None:
    request = asking()
    original = OpenAIServingChat._patch_reasoning_skip_special_tokens.__wrapped__  # type: ignore[attr-defined]
    original(serving(TOKENIZERS[Phase.INSIDE]), request)
    assert request.skip_special_tokens is True


@pytest.mark.parametrize("choice", ["auto", "required", "named"])
def test_the_server_gives_the_same_calls_streamed_and_not(choice: str) -> None:
    named = ToolChoice(function=ToolChoiceFuncName(name="get_weather")) if choice == "named" else choice
    case = next(case for seed in range(99) if len((case := draw(Random(seed), Form.XML)).calls) > 1 and case.content)
    _, rest = parsers(case.phase)[0].parse_non_stream(case.output)
    endpoint = serving(TOKENIZERS[Phase.INSIDE])
    calls, content, finish = endpoint._process_tool_calls(rest or "", REQUESTED, {"type": "stop"}, named)
    assert calls is not None
    assert content == case.content
    assert finish["type"] == "tool_calls"
    assert [call.index for call in calls] == list(range(len(case.calls)))
    read = [(call.function.name, json.loads(call.function.arguments)) for call in calls]
    assert read == list(case.calls)

    request = asking(tools=[tool.model_dump() for tool in REQUESTED], tool_choice=named)
    state: dict[int, Any] = {}
    called: dict[int, bool] = {}

    async def chunks() -> list[dict[str, Any]]:
        found, pieces = [], tokens(rest or "")
        for place, piece in enumerate(pieces):
            meta = {"meta_info": {"id": "1"}}
            is_last = place == len(pieces) - 1
            async for chunk in endpoint._process_tool_call_stream(
                0, piece, state, meta, request, called, False, is_last
            ):
                found.append(json.loads(chunk.removeprefix("data: "))["choices"][0]["delta"])
        assert endpoint._check_for_unstreamed_tool_args(state[0], {}, request, 0) is None
        return found

    deltas = asyncio.run(chunks())
    assert called == {0: True}
    assert "".join(delta.get("content") or "" for delta in deltas) == case.content
    arguments = [""] * len(calls)
    for call in (call for delta in deltas for call in delta.get("tool_calls") or ()):
        arguments[call["index"]] += call["function"]["arguments"]
    assert [json.loads(text) for text in arguments] == [meant for _, meant in case.calls]


# -- guided decoding ------------------------------------------------------------------------------------------

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
STRICT = [
    RequestedTool.model_validate({"function": {"name": name, "parameters": CITY, "strict": True}})
    for name in ("weather", "time")
]
_VOCABULARY = [b"</longcat_s>", *(bytes([byte]) for byte in range(256))]
_TOKENIZER = TokenizerInfo(_VOCABULARY, vocab_type=VocabType.RAW, stop_token_ids=[0])


def accepts(tools: Sequence[RequestedTool], template: Template, choice: Any, text: str, parallel: bool = True) -> bool:
    """Whether a text is an output of what SGLang's server makes of a request, as its scheduler compiles it."""
    parser = FunctionCallParser(list(tools), NAME, tokenizer=Tokenizer(template.text), tool_choice=choice)
    constraint = parser.get_structure_constraint(choice, parallel_tool_calls=parallel)
    assert constraint is not None
    kind, tag = constraint
    assert kind == "structural_tag"
    strip_structural_tag_excludes(tag, (THINK_OPEN, THINK_CLOSE))
    sent = asking().to_sampling_params(stop=[], model_generation_config={}, tool_call_constraint=constraint)
    matcher = GrammarMatcher(GrammarCompiler(_TOKENIZER).compile_structural_tag(sent["structural_tag"]))
    return bool(matcher.accept_string(text) and matcher.accept_token(0))


def call(template: Template, name: str, arguments: dict[str, Any]) -> str:
    if template.form is Form.JSON:
        return f"{CALL_OPEN}\n{json.dumps({'name': name, 'arguments': arguments})}\n{CALL_CLOSE}"
    pairs = "".join(
        f"{KEY_OPEN}{key}{KEY_CLOSE}\n{VALUE_OPEN}{value}{VALUE_CLOSE}\n" for key, value in arguments.items()
    )
    return f"{CALL_OPEN}{name}\n{pairs}{CALL_CLOSE}"


@pytest.mark.parametrize("template", [THINKING, THINKING_2601], ids=lambda template: template.name)
def test_a_call_is_guided_in_the_form_of_the_checkpoints_template(template: Template) -> None:
    other = THINKING if template is THINKING_2601 else THINKING_2601
    first, second = call(template, "weather", {"city": "Paris", "days": 3}), call(template, "time", {"city": "Rome"})
    separator = "\n" if template.form is Form.XML else ""
    both = f"{first}{separator}{second}"
    named = ToolChoice(function=ToolChoiceFuncName(name="time"))
    for choice, text, accepted in (
        ("required", first, True),
        ("required", both, True),
        ("required", f"Well. {first}", False),
        ("required", "", False),
        ("required", call(template, "weather", {"days": 3}), False),
        ("required", call(template, "rain", {"city": "Paris"}), False),
        ("required", call(other, "weather", {"city": "Paris"}), False),
        (named, second, True),
        (named, first, False),
        (named, both, False),
        ("auto", f"Well. {both}", True),
        ("auto", "Well.", True),
        ("auto", call(template, "weather", {"days": "three"}), False),
    ):
        assert accepts(STRICT, template, choice, text) is accepted, (choice, text)
    assert accepts(STRICT, template, "required", first, parallel=False)
    assert not accepts(STRICT, template, "required", both, parallel=False)


def test_a_free_choice_of_tools_that_are_not_strict_is_not_guided() -> None:
    parser = FunctionCallParser(REQUESTED, NAME, tokenizer=TOKENIZERS[Phase.INSIDE])
    assert parser.get_structure_constraint("auto") is None
    assert parser.owns_tool_format()
    assert not isinstance(parser.detector, Glm47MoeDetector)


# -- names ----------------------------------------------------------------------------------------------------

_PARSE = """
import argparse, contextlib, io, json, sys
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

def outcome(parser, flag, name):
    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error):
            return getattr(parser.parse_args(["--model-path", "m", flag, name]), flag[2:].replace("-", "_"))
    except SystemExit:
        return error.getvalue()

def outcomes():
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    flags = ("--tool-call-parser", "--reasoning-parser")
    return [[outcome(parser, flag, name) for name in ("longcat", "auto", "wrong")] for flag in flags]

before = outcomes()
load_plugins()
parsers = {"longcat_sglang.chat", "sglang.srt.function_call.function_call_parser",
           "sglang.srt.parser.reasoning_parser", "sglang.srt.parser.template_detection"}
print(json.dumps([before, outcomes(), sorted(parsers & set(sys.modules))]))
"""


@pytest.fixture(scope="module")
def parsed() -> tuple[list[list[str]], list[list[str]], list[str]]:
    """What each flag's command lines give before plugins are loaded and then; which parsers' modules are imported."""
    before, after, imported = json.loads(python(_PARSE))
    return before, after, imported


def test_the_command_line_takes_the_names_and_imports_no_parser(parsed: Any) -> None:
    _, after, imported = parsed
    for taken, detected, refused in after:
        assert (taken, detected) == ("longcat", "auto")
        assert "invalid choice: 'wrong'" in refused
    assert imported == []


def test_sglang_still_refuses_the_names_without_the_plugin(parsed: Any) -> None:
    for refused, _, _ in parsed[0]:
        assert "invalid choice: 'longcat'" in refused


def test_parsers_are_there_whichever_is_imported_first() -> None:
    """A scheduler has imported SGLang's reasoning parser before it loads plugins, a server has not."""
    outcome = python(
        "import json\n"
        "import sglang.srt.parser.reasoning_parser as reasoning, sglang.srt.parser.template_manager as manager\n"
        "from sglang.srt.plugins import load_plugins\n"
        "load_plugins()\n"
        "from sglang.srt.function_call.function_call_parser import FunctionCallParser\n"
        "from longcat_sglang.engine import SGLANG\n"
        "from longcat_sglang.hooks import HOOKS\n"
        "SGLANG.require_supported(HOOKS)\n"
        "print(json.dumps([reasoning.ReasoningParser.DetectorMap['longcat'].__name__,\n"
        "                  FunctionCallParser.ToolCallParserEnum['longcat'].__name__,\n"
        "                  manager.TOOL_CALL_PARSER_RULES[0].value]))"
    )
    assert json.loads(outcome) == ["ReasoningDetector", "ToolDetector", "longcat"]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda template: template.name)
def test_auto_takes_our_parsers_for_longcats_templates(template: Template) -> None:
    _, config = template_detection.detect_reasoning_pattern(template.text)
    reasoning = template_detection.detect_reasoning_parser(template.text, None, config)
    assert reasoning == (None if template is CHAT else NAME)
    assert template_detection.detect_tool_call_parser(template.text, None, config) == NAME
    manager = template_manager.TemplateManager()
    manager._run_template_detection(template.text, Tokenizer(template.text))
    assert (manager.suggested_reasoning_parser, manager.suggested_tool_call_parser) == (reasoning, NAME)


def test_auto_takes_no_other_parser_for_other_templates() -> None:
    template = "{% set enable_thinking = enable_thinking | default(true) %}<tool_call></tool_call><think></think>"
    _, config = template_detection.detect_reasoning_pattern(template)
    for rules in (template_detection.REASONING_PARSER_RULES, template_detection.TOOL_CALL_PARSER_RULES):
        context = template_detection.build_detection_context(template, None, config)
        assert template_detection.match_rules(context, rules, "") == template_detection.match_rules(
            context, rules[1:], ""
        )
        assert NAME not in [rule.value for rule in rules[1:]]


def test_sglang_still_takes_another_parser_for_longcats_templates() -> None:
    _, config = template_detection.detect_reasoning_pattern(THINKING_2601.text)
    context = template_detection.build_detection_context(THINKING_2601.text, None, config)
    for rules in (template_detection.REASONING_PARSER_RULES, template_detection.TOOL_CALL_PARSER_RULES):
        assert template_detection.match_rules(context, rules[1:], "") in ("qwen", "qwen3")


def test_a_parser_that_is_not_ours_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registration.registered_tool_parser() == registration.registered_reasoning_parser() == "longcat_sglang.chat"
    monkeypatch.delitem(FunctionCallParser.ToolCallParserEnum, NAME)
    monkeypatch.setitem(ReasoningParser.DetectorMap, NAME, dict)
    monkeypatch.setattr(template_manager, "TOOL_CALL_PARSER_RULES", template_detection.TOOL_CALL_PARSER_RULES[1:])
    assert registration.registered_tool_parser() == "none"
    assert registration.registered_reasoning_parser() == "builtins"
    assert not registration.registered_detection().startswith("longcat_")
