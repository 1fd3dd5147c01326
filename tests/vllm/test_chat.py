"""The parsers `longcat` as vLLM's registries give them and its `DelegatingParser` calls them, without an engine."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tokenizers.decoders import DecodeStream
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.utils.tool_calls_utils import maybe_filter_parallel_tool_calls
from vllm.parser import ParserManager
from vllm.parser.abstract_parser import Parser
from vllm.reasoning import ReasoningParserManager
from vllm.tokenizers import TokenizerLike, get_tokenizer
from vllm.tool_parsers import ToolParserManager
from xgrammar import GrammarCompiler, GrammarMatcher, StructuralTag, TokenizerInfo, VocabType

from longcat_cli import example_tokenizer
from longcat_core.chat.events import Call, Message
from longcat_core.chat.parser import parse
from longcat_core.chat.prompt import Phase
from longcat_core.chat.tags import (
    CALL_CLOSE,
    CALL_OPEN,
    KEY_CLOSE,
    KEY_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    VALUE_CLOSE,
    VALUE_OPEN,
)
from longcat_core.chat.templates import THINKING, THINKING_2601, Form
from longcat_vllm import register
from tests.conversations import TOOLS, draw

CASES = 100
"""Conversations of each form, each in three cuts."""
TEMPLATES = {Form.JSON: THINKING, Form.XML: THINKING_2601}
AnyRequest = ChatCompletionRequest | ResponsesRequest

register()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[Form, TokenizerLike]:
    found = {}
    for form, template in TEMPLATES.items():
        directory: Path = tmp_path_factory.mktemp(template.name)
        example_tokenizer.write(directory, 400, 4096, ["the weather in Paris, def f(x): return x\n" * 20], template)
        found[form] = get_tokenizer(str(directory))
    return found


def chat(**fields: Any) -> ChatCompletionRequest:
    tools = [{"type": "function", "function": {"name": each.name, "parameters": each.parameters}} for each in TOOLS]
    wanted = {"tools": tools, "messages": [{"role": "user", "content": "hi"}]} | fields
    return ChatCompletionRequest.model_validate({key: value for key, value in wanted.items() if value is not None})


def responses(**fields: Any) -> ResponsesRequest:
    tools = [{"type": "function", "name": each.name, "parameters": each.parameters} for each in TOOLS]
    return ResponsesRequest.model_validate({"tools": tools, "input": "hi"} | fields)


def parser_of(
    tokenizer: TokenizerLike, request: AnyRequest, tool: str | None = "longcat", reasoning: str | None = "longcat"
) -> Parser:
    found = ParserManager.get_parser(tool, reasoning, enable_auto_tools=True, tokenizer=tokenizer)
    assert found is not None
    return found(tokenizer, request.tools, chat_template_kwargs={})


def prompt_of(tokenizer: TokenizerLike, form: Form, phase: Phase) -> list[int]:
    before, turn = (
        ("<longcat_user>hi", "<longcat_assistant>") if form is Form.XML else ("[Round 0] USER:hi", "ASSISTANT:")
    )
    think_on = "" if phase is Phase.ANSWER else " /think_on"
    opening = {Phase.OPENED: THINK_OPEN, Phase.INSIDE: f"{THINK_OPEN}\n"}.get(phase, "")
    return tokenizer.encode(f"{before}{think_on} {turn}{opening}", add_special_tokens=False)


def pieces_of(tokenizer: TokenizerLike, output: str, random: Random, longest: int) -> list[tuple[str, list[int]]]:
    """The output in steps of up to `longest` tokens, as text and ids; what is no whole character comes later."""
    ids = tokenizer.encode(output, add_special_tokens=False)
    stream, pieces, at = DecodeStream(skip_special_tokens=False), [], 0
    while at < len(ids):
        step = ids[at : at + random.randint(1, longest)]
        at += len(step)
        pieces.append(("".join(stream.step(tokenizer._tokenizer, each) or "" for each in step), step))  # type: ignore[attr-defined]
    assert "".join(text for text, _ in pieces) == output
    return pieces


def streamed(
    parser: Parser, request: AnyRequest, prompt: list[int], pieces: Iterable[tuple[str, list[int]]]
) -> Message:
    reasoning = content = ""
    calls: list[list[str]] = []
    pieces = list(pieces)
    for i, (text, ids) in enumerate(pieces):
        delta = parser.parse_delta(text, ids, request, prompt, finished=i == len(pieces) - 1)
        if delta is None:
            continue
        reasoning += delta.reasoning or ""
        content += delta.content or ""
        for call in delta.tool_calls:
            assert call.function is not None
            if call.id is not None:
                assert call.index == len(calls), "calls begin in order, once each"
                assert call.type == "function"
                calls.append([call.function.name or "", ""])
            else:
                assert call.function.name is None
            calls[call.index][1] += call.function.arguments or ""
    return Message(reasoning, content, tuple(Call(name, arguments, True) for name, arguments in calls))


def unstreamed(parser: Parser, request: AnyRequest, prompt: list[int], output: str) -> Message:
    parser.set_prompt_token_ids(prompt)
    reasoning, content, calls = parser.parse(output, request, enable_auto_tools=True)
    return Message(reasoning or "", content or "", tuple(Call(call.name, call.arguments, True) for call in calls or ()))


def of(message: Message) -> tuple[str, str, tuple[tuple[str, Any], ...]]:
    return message.reasoning, message.content, tuple((c.name, json.loads(c.arguments)) for c in message.calls)


# -- the registries


def test_both_parsers_are_in_vllms_registries_and_every_other_one_stays() -> None:
    from vllm.tool_parsers import _TOOL_PARSERS_TO_REGISTER

    assert ToolParserManager.get_tool_parser("longcat").__module__ == "longcat_vllm.chat"
    assert ReasoningParserManager.get_reasoning_parser("longcat").__module__ == "longcat_vllm.chat"
    for name, (module, class_name) in _TOOL_PARSERS_TO_REGISTER.items():
        if name != "longcat":
            assert ToolParserManager.lazy_parsers[name] == (f"vllm.tool_parsers.{module}", class_name)
    with pytest.raises(KeyError):
        ToolParserManager.get_tool_parser("longcat_flash")


def test_vllms_own_parser_that_was_loaded_before_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.tool_parsers.longcat_tool_parser import LongcatFlashToolParser

    monkeypatch.setitem(ToolParserManager.tool_parsers, "longcat", LongcatFlashToolParser)
    register()
    assert ToolParserManager.get_tool_parser("longcat").__module__ == "longcat_vllm.chat"


def test_a_tokenizer_without_the_tags_of_reasoning_is_refused_at_start(tmp_path: Path) -> None:
    example_tokenizer.write(tmp_path, 400, 4096, ["a"], THINKING)
    tokenizer_json = (tmp_path / "tokenizer.json").read_text().replace("longcat_think", "another_think")
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    with pytest.raises(
        TypeError, match=r"--reasoning-parser longcat cannot .* has no token <longcat_think> and </long"
    ):
        ParserManager.get_parser(None, "longcat", tokenizer=get_tokenizer(str(tmp_path)))


# -- what is read


@pytest.mark.parametrize("form", Form)
def test_generated_conversations_come_back_streamed_and_not(form: Form, tokenizers: dict[Form, TokenizerLike]) -> None:
    tokenizer = tokenizers[form]
    for seed in range(CASES):
        random = Random(seed)
        case = draw(random, form)
        request = responses() if seed % 3 == 0 else chat()
        prompt = prompt_of(tokenizer, form, case.phase)
        parser = parser_of(tokenizer, request)
        whole = unstreamed(parser, request, prompt, case.output)
        assert of(whole) == (case.reasoning, case.content, case.calls), f"{seed=}\n{case}"
        for longest in (1, 4, 40):
            parser = parser_of(tokenizer, request)
            pieces = pieces_of(tokenizer, case.output, random, longest)
            if case.output:
                assert streamed(parser, request, prompt, pieces) == whole, f"{seed=} {longest=}\n{case}"


def test_a_name_comes_at_once_and_arguments_as_they_grow(tokenizers: dict[Form, TokenizerLike]) -> None:
    tokenizer, request = tokenizers[Form.XML], chat()
    parser, prompt = parser_of(tokenizer, request), prompt_of(tokenizer, Form.XML, Phase.OPENED)

    def feed(text: str) -> Any:
        return parser.parse_delta(
            text, tokenizer.encode(text, add_special_tokens=False), request, prompt, finished=False
        )

    assert feed("\nIt rains.").reasoning == "It rains."
    assert feed(f"\n{THINK_CLOSE}\n") is None
    (call,) = feed(f"{CALL_OPEN}get_weather\n").tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", "")
    (call,) = feed(f"{KEY_OPEN}text{KEY_CLOSE}\n{VALUE_OPEN}a long").tool_calls
    assert call.function.arguments == '{"text": "a long'
    assert call.model_dump(exclude_unset=True) == {"index": 0, "function": {"arguments": '{"text": "a long'}}
    assert feed(" value").tool_calls[0].function.arguments == " value"


OUTPUT = (
    f"\nthought\n{THINK_CLOSE}\nfirst {CALL_OPEN}get_weather\n{KEY_OPEN}count{KEY_CLOSE}\n{VALUE_OPEN}1{VALUE_CLOSE}\n"
    f"{CALL_CLOSE}\n{THINK_OPEN}\nagain\n{THINK_CLOSE}\n{CALL_OPEN}naïve\n{CALL_CLOSE}\nlast"
)


def both_ways(tokenizer: TokenizerLike, request: AnyRequest, phase: Phase, output: str, **parsers: Any) -> Message:
    prompt = prompt_of(tokenizer, Form.XML, phase)
    whole = unstreamed(parser_of(tokenizer, request, **parsers), request, prompt, output)
    for longest in (1, 7, 100):
        parser = parser_of(tokenizer, request, **parsers)
        assert streamed(parser, request, prompt, pieces_of(tokenizer, output, Random(0), longest)) == whole, longest
    return whole


def test_reasoning_behind_a_call_is_not_lost_between_the_parsers(tokenizers: dict[Form, TokenizerLike]) -> None:
    message = both_ways(tokenizers[Form.XML], chat(), Phase.OPENED, OUTPUT)
    assert of(message) == ("thoughtagain", "first last", (("get_weather", {"count": 1}), ("naïve", {})))


@pytest.mark.parametrize("request_", [chat(tool_choice="none"), chat(tools=None)], ids=["none", "no tools"])
def test_where_no_call_is_wanted_it_is_text_to_the_letter(
    request_: AnyRequest, tokenizers: dict[Form, TokenizerLike]
) -> None:
    message = both_ways(tokenizers[Form.XML], request_, Phase.OPENED, OUTPUT)
    assert message.calls == ()
    assert message.reasoning == "thoughtagain"
    head, _, tail = OUTPUT.partition(f"{THINK_CLOSE}\n")[2].partition(f"{THINK_OPEN}\nagain\n{THINK_CLOSE}\n")
    assert message.content == head + tail


def test_without_a_reasoning_parser_its_tags_are_text(tokenizers: dict[Form, TokenizerLike]) -> None:
    message = both_ways(tokenizers[Form.XML], chat(), Phase.OPENED, OUTPUT, reasoning=None)
    assert message.reasoning == ""
    assert message.content == f"\nthought\n{THINK_CLOSE}\nfirst {THINK_OPEN}\nagain\n{THINK_CLOSE}\nlast"
    assert [call.name for call in message.calls] == ["get_weather", "naïve"]


def test_without_a_tool_parser_calls_are_text(tokenizers: dict[Form, TokenizerLike]) -> None:
    message = both_ways(tokenizers[Form.XML], chat(tools=None), Phase.OPENED, OUTPUT, tool=None)
    assert (message.reasoning, message.content) == ("thought", OUTPUT.partition(f"{THINK_CLOSE}\n")[2])


@pytest.mark.parametrize("phase", Phase)
def test_an_output_that_ends_anywhere_is_read_alike(phase: Phase, tokenizers: dict[Form, TokenizerLike]) -> None:
    for end in range(1, len(OUTPUT), 7):
        message = both_ways(tokenizers[Form.XML], chat(), phase, OUTPUT[:end])
        meant = parse(OUTPUT[:end], TOOLS, phase)
        assert (message.reasoning, message.content) == (meant.reasoning, meant.content), end
        assert [(c.name, c.arguments) for c in message.calls] == [(c.name, c.arguments) for c in meant.calls], end


def test_only_the_first_call_is_given_where_parallel_calls_are_not_wanted(
    tokenizers: dict[Form, TokenizerLike],
) -> None:
    request = chat(parallel_tool_calls=False)
    tokenizer, prompt = tokenizers[Form.XML], prompt_of(tokenizers[Form.XML], Form.XML, Phase.OPENED)
    delta = parser_of(tokenizer, request).parse_delta(OUTPUT, [1], request, prompt, finished=True)
    assert delta is not None
    assert len(delta.tool_calls) == 2
    assert [call.index for call in maybe_filter_parallel_tool_calls(delta, request).tool_calls] == [0]


# -- token ids


def test_a_grammar_begins_where_reasoning_ends_by_token_ids(tokenizers: dict[Form, TokenizerLike]) -> None:
    for form, tokenizer in tokenizers.items():
        parser = parser_of(tokenizer, chat())
        for phase in Phase:
            assert parser.is_reasoning_end(prompt_of(tokenizer, form, phase)) == (phase is Phase.ANSWER), (form, phase)
        reasoner = ReasoningParserManager.get_reasoning_parser("longcat")(tokenizer)
        ids = tokenizer.get_vocab()
        closing, call = ids[THINK_CLOSE], ids[CALL_OPEN]
        assert reasoner.find_reasoning_end([300, closing, 301]) == (1, False)  # type: ignore[attr-defined]
        assert reasoner.find_reasoning_end([300, call, 301]) == (1, True)  # type: ignore[attr-defined]
        assert reasoner.find_reasoning_end([300, 301]) == (2, False)  # type: ignore[attr-defined]
        assert reasoner.is_reasoning_end_streaming([300, closing], [closing])
        assert not reasoner.is_reasoning_end_streaming([closing, 300], [300])
        assert reasoner.extract_content_ids([300, closing, 301]) == [301]
        assert reasoner.extract_content_ids([300, call, 301]) == [call, 301]
        assert reasoner.extract_content_ids([300]) == [300]


@pytest.mark.parametrize("phase", Phase)
def test_tokens_of_reasoning_are_counted_streamed_and_not(phase: Phase, tokenizers: dict[Form, TokenizerLike]) -> None:
    tokenizer, request = tokenizers[Form.XML], chat()
    thought = "the weather in Paris"
    output = f"{'' if phase.is_open else THINK_OPEN}{thought}{THINK_CLOSE}fine"
    ids = tokenizer.encode(output, add_special_tokens=False)
    wanted = len(tokenizer.encode(thought, add_special_tokens=False))
    prompt = prompt_of(tokenizer, Form.XML, phase)
    for read, how in ((streamed, pieces_of(tokenizer, output, Random(0), 3)), (unstreamed, output)):
        parser = parser_of(tokenizer, request)
        read(parser, request, prompt, how)  # type: ignore[operator]
        assert parser.count_reasoning_tokens(ids) == wanted


# -- guided decoding


def calls_of(form: Form, count: int, value: str = "1") -> str:
    if form is Form.JSON:
        call = f'{CALL_OPEN}\n{{"name": "get_weather", "arguments": {{"count": {value}}}}}\n{CALL_CLOSE}'
        return call * count
    pair = f"{KEY_OPEN}count{KEY_CLOSE}\n{VALUE_OPEN}{value}{VALUE_CLOSE}\n"
    return "\n".join([f"{CALL_OPEN}get_weather\n{pair}{CALL_CLOSE}"] * count)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    vocabulary = [bytes([byte]) for byte in range(256)] + [b"</s>"]
    return GrammarCompiler(TokenizerInfo(vocabulary, VocabType.RAW, stop_token_ids=[256]), max_threads=1)


def accepts(compiler: GrammarCompiler, request: AnyRequest, output: str) -> bool:
    params = request.structured_outputs
    assert params is not None
    tag = StructuralTag.model_validate(json.loads(params.structural_tag or ""))
    matcher = GrammarMatcher(compiler.compile_structural_tag(tag))
    return bool(matcher.accept_string(output)) and bool(matcher.accept_token(256))


def adjusted(tokenizer: TokenizerLike, request: AnyRequest) -> Any:
    return parser_of(tokenizer, request).adjust_request(request)


STRICT = {
    "type": "object",
    "properties": {"count": {"type": "integer"}},
    "required": ["count"],
    "additionalProperties": False,
}


def function(strict: bool | None = None) -> dict[str, Any]:
    named = {"name": "get_weather", "parameters": STRICT}
    return {"type": "function", "function": named if strict is None else named | {"strict": strict}}


@pytest.mark.parametrize("form", Form)
def test_a_required_call_has_the_form_of_the_checkpoint_and_its_schema(
    form: Form, tokenizers: dict[Form, TokenizerLike], compiler: GrammarCompiler
) -> None:
    request = adjusted(tokenizers[form], chat(tools=[function()], tool_choice="required"))
    other = Form.XML if form is Form.JSON else Form.JSON
    assert accepts(compiler, request, calls_of(form, 1))
    assert accepts(compiler, request, calls_of(form, 2))
    for refused in ("", "text", calls_of(other, 1), calls_of(form, 1, "no"), calls_of(form, 1) + "text"):
        assert not accepts(compiler, request, refused), refused


@pytest.mark.parametrize("form", Form)
def test_a_named_function_is_called_once(
    form: Form, tokenizers: dict[Form, TokenizerLike], compiler: GrammarCompiler
) -> None:
    another = {"type": "function", "function": {"name": "another", "parameters": {"type": "object"}}}
    in_chat = {"type": "function", "function": {"name": "get_weather"}}
    in_responses = {"type": "function", "name": "get_weather"}
    flat = [{"type": "function", **each["function"]} for each in (function(), another)]
    for request in (
        chat(tools=[function(), another], tool_choice=in_chat),
        responses(tools=flat, tool_choice=in_responses),
    ):
        guided = adjusted(tokenizers[form], request)
        assert accepts(compiler, guided, calls_of(form, 1))
        for refused in ("text", calls_of(form, 2), calls_of(form, 1).replace("get_weather", "another")):
            assert not accepts(compiler, guided, refused), refused


@pytest.mark.parametrize("form", Form)
def test_auto_guides_strict_tools_and_leaves_text_free(
    form: Form, tokenizers: dict[Form, TokenizerLike], compiler: GrammarCompiler
) -> None:
    assert adjusted(tokenizers[form], chat(tools=[function()])).structured_outputs is None
    request = adjusted(tokenizers[form], chat(tools=[function(strict=True)]))
    for accepted in ("text", calls_of(form, 1), f"text {calls_of(form, 2)}"):
        assert accepts(compiler, request, accepted), accepted
    assert not accepts(compiler, request, calls_of(form, 1, "no"))


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("form", Form)
def test_one_call_is_allowed_where_parallel_calls_are_not_wanted(
    form: Form, choice: str, tokenizers: dict[Form, TokenizerLike], compiler: GrammarCompiler
) -> None:
    fields = {"tools": [function()], "tool_choice": choice, "parallel_tool_calls": False}
    request = adjusted(tokenizers[form], chat(**fields))
    assert accepts(compiler, request, calls_of(form, 1))
    assert not accepts(compiler, request, calls_of(form, 2))


def test_tags_stay_in_the_text_where_a_parser_looks_for_them(tokenizers: dict[Form, TokenizerLike]) -> None:
    tokenizer = tokenizers[Form.XML]
    for kept, request, parsers in (
        (False, chat(), {}),
        (False, responses(), {}),
        (False, chat(), {"reasoning": None}),
        (False, chat(tools=None), {"tool": None}),
        (True, chat(tool_choice="none"), {"reasoning": None}),
    ):
        assert parser_of(tokenizer, request, **parsers).adjust_request(request).skip_special_tokens is kept
