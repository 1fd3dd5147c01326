"""SGLang's detectors of LongCat's reasoning and tool calls: adapters around `longcat_core.chat`.

Imported when SGLang's own parsers are (`registration.register_reasoning_parser`), in servers of any model.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NoReturn

from sglang.srt.entrypoints.openai.protocol import Tool as RequestedTool
from sglang.srt.entrypoints.openai.protocol import ToolChoice
from sglang.srt.function_call.base_format_detector import BaseFormatDetector, StructuralTag
from sglang.srt.function_call.core_types import StreamingParseResult, ToolCallItem
from sglang.srt.parser.reasoning_parser import BaseReasoningFormatDetector
from sglang.srt.parser.reasoning_parser import StreamingParseResult as SplitText

from longcat_core.chat.events import ArgumentsDelta, CallStart, ContentDelta, Event, ReasoningDelta
from longcat_core.chat.grammar import Choice, Request, structural_tag
from longcat_core.chat.parser import ChatParser
from longcat_core.chat.prompt import Phase, phase_of
from longcat_core.chat.reasoning import ReasoningSplitter
from longcat_core.chat.tags import CALL_CLOSE, CALL_OPEN, THINK_CLOSE, THINK_OPEN
from longcat_core.chat.templates import form_of
from longcat_core.chat.tools import Tool

_ANY_TAG = ("<longcat_", "</longcat_")


class ToolDetector(BaseFormatDetector):
    """Tool calls of one output, in either form, behind its first block of reasoning.

    Where a call is required, the model writes its own form, guided by a structural tag: no JSON of SGLang's.
    Reasoning that comes here is content, as SGLang has no other place for it: its later blocks, or all of it where no
    reasoning parser is set.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        """tokenizer: of the checkpoint, whose template says which form of calls it has learnt."""
        super().__init__()
        self.bot_token, self.eot_token = CALL_OPEN, CALL_CLOSE
        self._tokenizer = tokenizer
        self._parser: ChatParser | None = None

    def has_tool_call(self, text: str) -> bool:
        """Whether there is any tag of LongCat's, whole or cut: only the parser tells what is text then, as it does in
        a stream."""
        return any(tag in text for tag in _ANY_TAG)

    def detect_and_parse(self, text: str, tools: Sequence[RequestedTool]) -> StreamingParseResult:
        """A whole output. A call's arguments are as far as the model wrote them."""
        parser = ChatParser(_read(tools))
        result = _result([*parser.feed(text), *parser.finish()])
        calls: list[ToolCallItem] = []
        for item in result.calls:
            if item.name is not None:
                calls.append(item)
            else:
                calls[-1].parameters += item.parameters
        return StreamingParseResult(normal_text=result.normal_text, calls=calls)

    def parse_streaming_increment(self, new_text: str, tools: Sequence[RequestedTool]) -> StreamingParseResult:
        if self._parser is None:
            self._parser = ChatParser(_read(tools))
        return _result(self._parser.feed(new_text))

    def finish(self, tools: Sequence[RequestedTool]) -> StreamingParseResult:
        return StreamingParseResult() if self._parser is None else _result(self._parser.finish())

    def supports_structural_tag(self) -> bool:
        """Not by the begin and end of `structure_info`, which the XML form does not have."""
        return False

    def parses_required_natively(self) -> bool:
        return True

    def structure_info(self) -> NoReturn:
        raise NotImplementedError("LongCat's calls are guided by get_structural_tag")

    def get_structural_tag(
        self,
        tools: Sequence[RequestedTool] | None = None,
        tool_choice: ToolChoice | str = "auto",
        thinking_mode: bool = False,
        parallel_tool_calls: bool = True,
    ) -> StructuralTag:
        """Of the form that the checkpoint has learnt.

        thinking_mode: whether the grammar is to let reasoning pass, as no reasoning parser does.

        Raises:
            ValueError: as `structural_tag`.
        """
        choice = tool_choice.function.name if isinstance(tool_choice, ToolChoice) else Choice(tool_choice)
        template = getattr(self._tokenizer, "chat_template", None)
        vocabulary = self._tokenizer.get_vocab() if template is None and self._tokenizer is not None else ()
        request = Request(_read(tools or ()), choice, parallel_tool_calls)
        phase = Phase.OPENED if thinking_mode else Phase.ANSWER
        return StructuralTag.model_validate(structural_tag(request, form_of(template, vocabulary), phase))


class ReasoningDetector(BaseReasoningFormatDetector):
    """The first block of reasoning of one output, and the rest as it is."""

    def __init__(
        self,
        stream_reasoning: bool = True,
        force_reasoning: bool = False,
        continue_final_message: bool = False,
        previous_content: Any = "",
        force_nonempty_content: bool = False,
        tokenizer: Any = None,
    ) -> None:
        """
        stream_reasoning: whether reasoning is given as it comes, and not all at its end.
        force_reasoning: whether thinking is on. The template then says who opens it, the prompt or the model.
        previous_content: what the output continues, if continue_final_message.
        force_nonempty_content: whether reasoning without an answer becomes the answer.
        """
        previous = previous_content if continue_final_message and isinstance(previous_content, str) else ""
        super().__init__(
            THINK_OPEN,
            THINK_CLOSE,
            force_reasoning=force_reasoning,
            stream_reasoning=stream_reasoning,
            continue_final_message=continue_final_message,
            previous_content=previous,
            force_nonempty_content=force_nonempty_content,
            reasoning_default="enable_thinking" if _thinks(tokenizer) else "explicit_enable_thinking",
        )
        self.think_start_self_label = "\n"  # how SGLang writes the reasoning of earlier turns: the tag, this, the text
        prompt = _generation_prompt(tokenizer, thinking=True) if force_reasoning else ""
        self._phase = phase_of((THINK_OPEN if prompt is None else prompt) + previous)
        self._splitter = ReasoningSplitter(self._phase)
        self._held: list[str] = []  # reasoning, if it is not streamed

    def _detect_and_parse_impl(self, text: str) -> SplitText:
        splitter = ReasoningSplitter(self._phase)
        reasoning, rest = zip(splitter.feed(text), splitter.finish(), strict=True)
        return SplitText(normal_text="".join(rest), reasoning_text="".join(reasoning))

    def _parse_streaming_increment_impl(self, new_text: str) -> SplitText:
        reasoning, rest = self._splitter.feed(new_text)
        self._in_reasoning = not self._splitter.ended  # what SGLang's `force_nonempty_content` asks
        if not self.stream_reasoning:
            reasoning = self._hold(reasoning, ended=self._splitter.ended)
        return SplitText(normal_text=rest, reasoning_text=reasoning)

    def finish(self) -> SplitText:
        reasoning, rest = self._splitter.finish()
        if not self.stream_reasoning:
            reasoning = self._hold(reasoning, ended=True)
        if self._force_nonempty_content and not self._splitter.ended and not rest:
            return SplitText(normal_text=self._accumulated_reasoning + reasoning)
        return SplitText(normal_text=rest, reasoning_text=reasoning)

    def _hold(self, reasoning: str, ended: bool) -> str:
        self._held.append(reasoning)
        if not ended:
            return ""
        held = "".join(self._held)
        self._held.clear()
        return held


def _read(tools: Iterable[RequestedTool]) -> list[Tool]:
    return [Tool.read(tool.model_dump()) for tool in tools]


def _result(events: Iterable[Event]) -> StreamingParseResult:
    """What SGLang's server makes chunks of: content first, then the pieces of calls in their order."""
    content: list[str] = []
    calls: list[ToolCallItem] = []
    for event in events:
        match event:
            case ContentDelta(text) | ReasoningDelta(text):
                content.append(text)
            case CallStart(index, name):
                calls.append(ToolCallItem(tool_index=index, name=name, parameters=""))
            case ArgumentsDelta(index, text):
                calls.append(ToolCallItem(tool_index=index, parameters=text))
    return StreamingParseResult(normal_text="".join(content), calls=calls)


def _thinks(tokenizer: Any) -> bool:
    """Whether a checkpoint's prompts ask for reasoning if a request does not say."""
    return phase_of(_generation_prompt(tokenizer) or "") is not Phase.ANSWER


def _generation_prompt(tokenizer: Any, thinking: bool | None = None) -> str | None:
    """How a prompt of the checkpoint's template ends; None if that cannot be said."""
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else _rendered(tokenizer, template, thinking)


@lru_cache(maxsize=8)
def _rendered(tokenizer: Any, template: str, thinking: bool | None) -> str | None:
    """template: that of the tokenizer, which a server may replace."""
    asked = {} if thinking is None else {"enable_thinking": thinking}
    messages = [{"role": "user", "content": ""}]
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **asked)
    except Exception:  # whatever a template raises: then the request alone tells
        return None
    return str(prompt)
