"""`python -m examples.nano.tools.measure CHECKPOINT`: held-out conversations, played with the tools, and the drafts."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from tokenizers import Tokenizer

from examples.nano import measure as nano
from examples.nano import publish, training_record
from examples.nano.corpus import END
from examples.nano.settings import Settings
from examples.nano.tools.conversations import KINDS, Conversation, Source, names_of
from examples.nano.tools.domain import ERROR, Call, Files, tools
from examples.nano.tools.rendering import render
from longcat_core.chat.events import Message
from longcat_core.chat.parser import parse
from longcat_core.chat.prompt import phase_of
from longcat_core.chat.tools import Tool
from longcat_core.drafting import gate as drafting
from longcat_core.reference import LatentCache, LongcatForCausalLM

_LONGEST_TURN, _MOST_TURNS = 200, 4
_DRAFTED = 36
"""Conversations along which drafts are looked at."""


def command(
    checkpoint: Annotated[Path, typer.Argument(help="That examples.nano.tools.train has written.")],
    count: Annotated[int, typer.Option(min=1, help="Held-out conversations, of each kind in turn.")] = 90,
) -> None:
    """Play held-out conversations with the reference, and add what comes of them to the checkpoint's record."""
    torch.set_num_threads(1)
    file = checkpoint / training_record.FILE
    made = json.loads(file.read_text())
    settings = Settings.read(file)
    model = LongcatForCausalLM.from_checkpoint(checkpoint)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    player = Player(model, tokenizer)
    played = play(player, Source(settings.seed, held_out=True, made_up=0.0), count)
    made_up = play(player, Source(settings.seed, held_out=True, made_up=1.0), count // 2)
    by_kind: dict[str, list[tuple[Conversation, Played]]] = defaultdict(list)
    for each in played:
        by_kind[each[0].kind].append(each)
    depth = settings.draft_layer.depth
    drafts = nano.accepted(chains(model, [each for _, each in played[:_DRAFTED]], depth), depth)
    made["results"] = {
        "held_out": score(played)._asdict(),
        "held_out_with_made_up_words": score(made_up)._asdict(),
        "by_kind": {kind: score(each)._asdict() for kind, each in by_kind.items()},
        "drafts": drafts._asdict(),
    }
    publish.write_json(file, made)
    typer.echo(json.dumps(made["results"], indent=2))


class Turn(NamedTuple):
    prompt: list[int]
    """Token ids, of the conversation so far."""
    output: list[int]
    """Token ids, with `END` if the model ended its turn."""
    message: Message


class Played(NamedTuple):
    """A round that the model has had with the tools."""

    turns: list[Turn]
    results: list[str]
    """What the tools gave, in the order of the calls."""

    @property
    def calls(self) -> list[list[Call]]:
        """By turn. A call that is not complete has no arguments."""
        return [
            [Call(each.name, json.loads(each.arguments) if each.complete else {}) for each in turn.message.calls]
            for turn in self.turns
        ]


class Player:
    """Greedy answers of the reference implementation, read by the parser that the engines use."""

    def __init__(self, model: LongcatForCausalLM, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._read: list[int] = []
        self._cache: LatentCache | None = None

    def play(
        self, messages: Sequence[dict[str, Any]], declared: Sequence[dict[str, Any]], thinking: bool, files: Files
    ) -> Played:
        """From a conversation that ends with a question to the answer, or to a call that no tool takes."""
        said = list(messages)
        turns: list[Turn] = []
        results: list[str] = []
        known = [Tool.read(tool) for tool in declared]
        while len(turns) < _MOST_TURNS:
            text = render(said, declared, thinking, prompt=True)
            prompt = self.tokenizer.encode(text).ids
            output = self._turn(prompt)
            content = self.tokenizer.decode([token for token in output if token != END], skip_special_tokens=False)
            message = parse(content, known, phase_of(text))
            played = Played([*turns, Turn(prompt, output, message)], results)
            turns = played.turns
            try:
                found = [files.result(call) for call in played.calls[-1]]
            except ValueError:
                return played
            results += found
            if not found:
                return played
            calls = [
                {"type": "function", "id": f"call_{index}", "function": {"name": name, "arguments": arguments}}
                for index, (name, arguments) in enumerate(played.calls[-1])
            ]
            said.append({"role": "assistant", "content": message.content, "tool_calls": calls})
            if message.reasoning:
                said[-1]["reasoning_content"] = message.reasoning
            said += [
                {"role": "tool", "tool_call_id": f"call_{index}", "content": result}
                for index, result in enumerate(found)
            ]
        return Played(turns, results)

    @torch.no_grad()
    def _turn(self, prompt: list[int]) -> list[int]:
        """Greedy ids to the end of the turn; what the prompt shares with the last one is not computed again."""
        shared = 0
        if self._cache is not None:
            while shared < min(len(prompt) - 1, len(self._read)) and prompt[shared] == self._read[shared]:
                shared += 1
        past = [each[:, :shared] for each in self._cache] if self._cache is not None else None
        output: list[int] = []
        new = prompt[shared:]
        while len(output) < _LONGEST_TURN:
            logits, _, past = self.model(torch.tensor([new]), past)
            output.append(int(logits[0, -1].argmax()))
            new = output[-1:]
            if output[-1] == END:
                break
        self._read, self._cache = prompt + output[:-1], past
        return output


class Score(NamedTuple):
    """Shares of conversations, of `conversations`."""

    calls: float
    """Every call has the right name and arguments, and there are no others."""
    answers: float
    """The calls are right, and the answer has every result of the last ones to the letter, or why they failed."""
    conversations: int


def score(played: Sequence[tuple[Conversation, Played]]) -> Score:
    return Score(
        sum(right_calls(*each) for each in played) / len(played),
        sum(right_calls(*each) and right_answer(*each) for each in played) / len(played),
        len(played),
    )


def asked(conversation: Conversation) -> int:
    """The place of the last question among the messages."""
    roles = [message["role"] for message in conversation.messages]
    return len(roles) - 1 - roles[::-1].index("user")


def right_calls(conversation: Conversation, played: Played) -> bool:
    wanted = [
        [Call(**call["function"]) for call in message.get("tool_calls", ())]
        for message in conversation.messages[asked(conversation) :]
        if message["role"] == "assistant"
    ]
    return played.calls == wanted


def right_answer(conversation: Conversation, played: Played) -> bool:
    """Also that it gives no call for an answer, and none but what was wanted where no tool was called."""
    last = played.turns[-1]
    if last.message.calls or last.output[-1] != END:
        return False
    count = len(played.calls[-2]) if len(played.calls) > 1 else 0
    if not count:
        return last.message.content == conversation.messages[-1]["content"]
    return all(result.removeprefix(ERROR) in last.message.content for result in played.results[-count:])


def play(player: Player, source: Source, count: int) -> list[tuple[Conversation, Played]]:
    """Conversations of each kind in turn."""
    declared, found = tools(), []
    for index in range(count):
        each = source.conversation(names_of(declared), KINDS[index % len(KINDS)])
        question = each.messages[: asked(each) + 1]
        found.append((each, player.play(question, declared, each.thinking, each.files)))
    return found


def chains(model: LongcatForCausalLM, played: Sequence[Played], depth: int) -> list[drafting.Chains]:
    """Every chain of drafts along the turns."""
    turns = [turn for each in played for turn in each.turns if len(turn.output) > depth]
    return [drafting.draft_chains(model, turn.prompt, turn.output, depth) for turn in turns]


if __name__ == "__main__":
    typer.run(command)
