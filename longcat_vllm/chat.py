"""LongCat's tool calls and reasoning in vLLM: its two parsers of the name `longcat`, around `longcat_core.chat`.

vLLM reads an output with the reasoning parser first, and gives the rest to the tool parser. Both are of the kind that
vLLM calls engine-based: they are fed with what is new, keep what they hold, and are told when the output is over.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import vllm.envs as envs
from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.parser.engine.adapters import ParserEngineReasoningAdapter
from vllm.parser.engine.parser_engine import ReasoningEnd
from vllm.reasoning import ReasoningParser
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.tool_parsers import ToolParser
from vllm.tool_parsers.structural_tag_registry import get_structural_tag_tools, resolve_tool_strictness
from vllm.tool_parsers.tool_strict_level import ToolStrictLevel
from vllm.tool_parsers.utils import get_function_tools
from xgrammar import StructuralTag

from longcat_core.chat.events import ArgumentsDelta, CallStart, ContentDelta, Event, Message, ReasoningDelta
from longcat_core.chat.grammar import Choice, Request, structural_tag
from longcat_core.chat.parser import ChatParser, gather, parse
from longcat_core.chat.prompt import Phase, ThinkTokens
from longcat_core.chat.reasoning import ReasoningSplitter
from longcat_core.chat.tags import THINK_CLOSE, THINK_OPEN
from longcat_core.chat.templates import Form, form_of
from longcat_core.chat.tools import Tool
from longcat_core.plugin.hooks import Stage
from longcat_vllm.engine import VLLM
from longcat_vllm.hooks import HOOKS

if TYPE_CHECKING:
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.parser.abstract_parser import Parser
    from vllm.tokenizers import TokenizerLike

    AnyRequest = ChatCompletionRequest | ResponsesRequest


class LongcatToolParser(ToolParser):
    """Reads calls in both forms, whatever the checkpoint's; where a grammar guides calls, it has the checkpoint's form.

    A request without tools, or with `tool_choice: none`, has no calls: what looks like one is text.
    """

    structural_tag_model = "longcat"
    """That there is a structural tag. vLLM's own of this name is not used: `get_structural_tag`."""
    engine_based_streaming = True
    skip_reasoning_parsing = False
    """vLLM sets it where there is no reasoning parser: tags around reasoning are text."""

    def __init__(self, tokenizer: TokenizerLike, tools: list[Any] | None = None) -> None:
        super().__init__(tokenizer, tools)
        _hook()
        self._stream: ChatParser | None = None
        self._held: list[Event] = []

    def adjust_request(self, request: AnyRequest) -> AnyRequest:
        """Keeps tags that are special tokens in the text."""
        request = super().adjust_request(request)
        if _tools(request) is not None:
            request.skip_special_tokens = False
        return request

    def get_structural_tag(
        self,
        request: AnyRequest,
        *,
        reasoning: bool = False,
        strict_level: ToolStrictLevel = ToolStrictLevel.AUTO,
    ) -> StructuralTag | None:
        """The grammar of calls, in the checkpoint's form; None where nothing is to be guided."""
        if not envs.VLLM_ENFORCE_STRICT_TOOL_CALLING or not request.tools:
            return None
        callable_tools = get_structural_tag_tools("longcat", request.tools, request.tool_choice)
        tools = resolve_tool_strictness(callable_tools, request.tool_choice, strict_level)
        if not tools:
            return None
        # Without parallel calls vLLM takes the first call out of this grammar.
        wanted = Request([Tool.read(tool.model_dump()) for tool in tools], _choice(request.tool_choice))
        phase = Phase.THINK if reasoning else Phase.ANSWER
        return StructuralTag.model_validate(structural_tag(wanted, self._form(), phase))

    def extract_tool_calls(self, model_output: str, request: AnyRequest) -> ExtractedToolCallInformation:
        message = self.read(model_output, request)
        calls = [ToolCall(function=FunctionCall(name=call.name, arguments=call.arguments)) for call in message.calls]
        return ExtractedToolCallInformation(tools_called=bool(calls), tool_calls=calls, content=message.content or None)

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: AnyRequest,
    ) -> DeltaMessage | None:
        """Reasoning of the first delta waits for the second, as vLLM drops one of two texts of reasoning in the delta
        in which the first block ends."""
        is_first = self._stream is None
        if self._stream is None:
            self._stream = self._begin(request)
        events = [*self._held, *self._stream.feed(delta_text)]
        self._held = [event for event in events if is_first and isinstance(event, ReasoningDelta)]
        return _delta(event for event in events if not (is_first and isinstance(event, ReasoningDelta)))

    def finish_streaming(self) -> DeltaMessage | None:
        """What was held back, when the output is over."""
        return _delta([*self._held, *self._stream.finish()]) if self._stream is not None else None

    def read(self, output: str, request: AnyRequest) -> Message:
        """All that an output says, behind its first block of reasoning. A stream is not disturbed."""
        parser = self._begin(request)
        return gather([*parser.feed(output), *parser.finish()])

    def _begin(self, request: AnyRequest) -> ChatParser:
        return ChatParser(_tools(request), None if self.skip_reasoning_parsing else Phase.ANSWER)

    def _form(self) -> Form:
        template = getattr(self.model_tokenizer, "chat_template", None)
        return form_of(template if isinstance(template, str) else None, self.vocab)


class LongcatReasoningParser(ParserEngineReasoningAdapter):
    """Reads the first block of reasoning, and leaves the rest to the tool parser, which reads the blocks behind it.

    It has none of vLLM's declarative engine. It is of this class because vLLM asks only such a one where reasoning ends
    with a token that belongs to the answer (`find_reasoning_end`): a call ends it as well.
    """

    def __init__(self, tokenizer: TokenizerLike, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            ValueError: if a tag around reasoning is not one token.
        """
        ReasoningParser.__init__(self, tokenizer, *args, **kwargs)
        tokens = ThinkTokens.of(self.vocab)
        if tokens is None:
            missing = " and ".join(tag for tag in (THINK_OPEN, THINK_CLOSE) if tag not in self.vocab)
            raise ValueError(f"the tokenizer has no token {missing}, wanted one each; leave --reasoning-parser out")
        _hook()
        self._tokens = tokens
        self._calls: LongcatToolParser | None = None
        self._begin(Phase.ANSWER)

    def _begin(self, phase: Phase) -> None:
        self._phase = phase
        self._splitter = ReasoningSplitter(phase)
        self._is_over = False

    @property
    def reasoning_start_str(self) -> str:
        return THINK_OPEN

    @property
    def reasoning_end_str(self) -> str:
        return THINK_CLOSE

    @property
    def reasoning_end_token_ids(self) -> frozenset[int]:
        return frozenset(
            {self._tokens.closing} if self._tokens.call is None else {self._tokens.closing, self._tokens.call}
        )

    def adjust_request(self, request: AnyRequest) -> AnyRequest:
        """Keeps tags that are special tokens in the text."""
        request.skip_special_tokens = False
        return request

    # -- by token ids: where a grammar begins, in the engine's process as well

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether an output behind these tokens, a prompt, begins with the answer."""
        return self._phase_of(input_ids) is Phase.ANSWER

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        return self._tokens.end(list(delta_ids)) is not None

    def find_reasoning_end(self, token_ids: Sequence[int]) -> ReasoningEnd:
        place = self._tokens.end(token_ids)
        if place is None:
            return ReasoningEnd(len(token_ids), implicit=False)
        return ReasoningEnd(place, implicit=token_ids[place] != self._tokens.closing)

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """Those of the answer. If its beginning is not among them, they are all of it: reasoning is over for vLLM only
        when the answer comes, which may be later than its tag."""
        end = self.find_reasoning_end(input_ids)
        if end.offset == len(input_ids):
            return input_ids
        return input_ids[end.offset if end.implicit else end.offset + 1 :]

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        return self._tokens.count(token_ids, self._phase)

    def _phase_of(self, prompt: Sequence[int]) -> Phase:
        return self._tokens.phase(prompt, lambda ids: self.model_tokenizer.decode(list(ids)))

    # -- by text

    def adjust_initial_state_from_prompt(self, prompt_token_ids: Sequence[int]) -> None:
        self._begin(self._phase_of(prompt_token_ids))

    def be_followed_by(self, calls: ToolParser | None) -> None:
        """Name the parser that reads the rest, which has no way to return reasoning that is not streamed."""
        self._calls = calls if isinstance(calls, LongcatToolParser) else None

    def extract_reasoning(self, model_output: str, request: AnyRequest) -> tuple[str | None, str | None]:
        splitter = ReasoningSplitter(self._phase)
        reasoning, rest = splitter.feed(model_output)
        last_reasoning, last_rest = splitter.finish()
        rest = rest or parse(last_rest).content
        reasoning += last_reasoning
        if self._calls is not None:
            reasoning += self._calls.read(rest, request).reasoning
        return reasoning or None, rest or None

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        reasoning, rest = self._splitter.feed(delta_text)
        self._is_over = bool(rest)
        return _said(reasoning, rest)

    def has_engine_confirmed_reasoning_end(self) -> bool:
        """Once the answer has begun: what is between is layout, which is the splitter's to leave out."""
        return self._is_over

    def finish_streaming(self) -> DeltaMessage | None:
        """What was held back, when the output is over. vLLM asks for it also when the answer begins."""
        if self._is_over:
            return None
        reasoning, rest = self._splitter.finish()
        return _said(reasoning, parse(rest).content)

    def get_streaming_fallback_content(self, text: str, request: AnyRequest) -> None:
        """Reasoning that does not end is not the answer."""
        return


def hand_on_the_prompt(
    original: Callable[..., None], parser: Parser, prompt_token_ids: Sequence[int], *args: Any, **kwargs: Any
) -> None:
    """What vLLM gives to the pair of parsers, given to the reasoning parser, before an output that is not streamed."""
    original(parser, prompt_token_ids, *args, **kwargs)
    reasoning = parser.reasoning_parser
    assert isinstance(reasoning, LongcatReasoningParser)
    reasoning.adjust_initial_state_from_prompt(prompt_token_ids)
    reasoning.be_followed_by(parser.tool_parser)


def leave_out_half_arguments(
    original: Callable[..., AnthropicMessagesResponse], serving: Any, response: ChatCompletionResponse
) -> AnthropicMessagesResponse:
    """Of a call that `max_tokens` cut off: Anthropic's format has no place for them, and `stop_reason` says it."""
    for call in response.choices[0].message.tool_calls:
        try:
            json.loads(call.function.arguments)
        except json.JSONDecodeError:
            call.function.arguments = "{}"
    return original(serving, response)


@functools.cache
def _hook() -> None:
    VLLM.install(HOOKS, Stage.PARSER)


def _tools(request: AnyRequest) -> list[Tool] | None:
    """The tools that a request lets a model call; None if it wants no call."""
    if not request.tools or request.tool_choice == "none":
        return None
    return [Tool.read(tool.model_dump()) for tool in get_function_tools(request.tools)]


def _choice(tool_choice: Any) -> Choice | str:
    """Of a request that vLLM guides; a function is named by itself (Responses), or within `function`."""
    if tool_choice is None or isinstance(tool_choice, str):
        return Choice(tool_choice or "auto")
    name: str = getattr(tool_choice, "function", tool_choice).name
    return name


def _said(reasoning: str, content: str) -> DeltaMessage | None:
    if not reasoning and not content:
        return None
    message = DeltaMessage()
    if reasoning:
        message.reasoning = reasoning
    if content:
        message.content = content
    return message


def _delta(events: Iterable[Event]) -> DeltaMessage | None:
    """Events of one delta as vLLM streams them, with one entry a call."""
    reasoning = content = ""
    calls: dict[int, DeltaToolCall] = {}
    for event in events:
        match event:
            case ReasoningDelta(text):
                reasoning += text
            case ContentDelta(text):
                content += text
            case CallStart(index, name):
                function = DeltaFunctionCall(name=name, arguments="")
                calls[index] = DeltaToolCall(index=index, id=make_tool_call_id(), type="function", function=function)
            case ArgumentsDelta(index, text):
                call = calls.setdefault(index, DeltaToolCall(index=index, function=DeltaFunctionCall(arguments="")))
                assert call.function is not None
                call.function.arguments = (call.function.arguments or "") + text
    message = _said(reasoning, content)
    if calls:
        message = message or DeltaMessage()
        message.tool_calls = list(calls.values())
    return message
