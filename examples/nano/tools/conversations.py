"""Conversations about the tools, drawn from a seed: a question, reasoning, calls, results, an answer."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from examples.nano.tools.domain import ADD, ERROR, LIST, MULTIPLY, READ, Call, Files
from longcat_nano import CHECKPOINT

_REAL = (
    "acorn amber anchor apple apron arrow atlas autumn badge bagel bamboo banana basket beach beacon berry bird "
    "blanket board boat book bottle branch bread bridge brook brush bucket budget butter button cabin cable cactus "
    "camera candle canyon carbon carpet castle cedar chain chalk cherry circle clock cloud coffee comet copper "
    "coral corner cotton cradle crayon cream crystal curtain daisy dawn desert diary dinner dolphin door dragon "
    "dream drum eagle earth echo engine fabric falcon farm feather fence fern field filter finger flame flower fog "
    "forest fossil fountain fox frame frost garden garlic ginger glacier glass globe glove gold grape gravel guitar "
    "hammer harbor harvest hazel helmet hill honey horizon house island ivory jacket jasmine jelly journal jungle "
    "kettle kitchen kite ladder lake lamp lantern leaf ledger lemon letter library light lily lion lizard lunch "
    "maple marble market meadow melon memo metal meteor mill mirror mist moon moss motor mountain museum music "
    "needle nest notes ocean olive onion orange orchard orchid otter oyster paint palace paper parcel pearl pebble "
    "pencil pepper piano pillow pine planet plum pocket poem pond poppy potato powder prairie pumpkin quartz quilt "
    "rabbit radio rain raven recipe reef report ribbon rice river robin rocket roof rope rose saddle sail salad "
    "salmon salt sand scarf school seed shadow shell ship shoe silk silver sketch sky snow soap song spark spider "
    "spoon spring squirrel stable star station stone storm story stove straw stream sugar summer sunset table tea "
    "temple thread thunder ticket tiger timber toast torch tower train travel treasure tree tulip tunnel turtle "
    "valley vase velvet village violet violin wagon walnut water wave weather whale wheat wheel willow window "
    "winter wolf wood wool yarn zebra"
)
_WORDS = _REAL.split()
_PIECES = sorted(
    {
        piece
        for token in Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).get_vocab()
        if re.fullmatch("[a-z]{2,6}", piece := token.removeprefix("\u0120"))
    }
)
"""Of the shipped tokenizer's vocabulary, in which U+0120 stands for a space. Words made of them have every token that a
word can have, so that a model learns to copy any, and not some words."""
_EXTENSIONS = ("txt", "md", "csv", "py", "json")
_HELD_OUT = 0.15


def _is_held_out(value: str) -> bool:
    return hashlib.sha256(value.encode()).digest()[0] < 256 * _HELD_OUT


_SYSTEM = ("You are a helpful assistant.", "Use the tools.", "Be brief.", "You are an agent with tools.")
_PHRASINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    ADD: (
        (
            "What is {a} plus {b}?",
            "Add {a} and {b}.",
            "How much is {a} + {b}?",
            "{a} + {b}?",
            "Compute {a} + {b}.",
            "What is the sum of {a} and {b}?",
            "Please add {a} and {b}.",
            "What is {a} + {b}?",
            "Calculate {a} plus {b}.",
            "Tell me {a} plus {b}.",
        ),
        ("Can you add {a} and {b}?", "I need {a} plus {b}."),
    ),
    MULTIPLY: (
        (
            "What is {a} times {b}?",
            "Multiply {a} by {b}.",
            "Multiply {a} and {b}.",
            "How much is {a} * {b}?",
            "{a} * {b}?",
            "Compute {a} times {b}.",
            "What is the product of {a} and {b}?",
            "Please multiply {a} by {b}.",
            "What is {a} * {b}?",
            "Calculate {a} times {b}.",
        ),
        ("Can you multiply {a} by {b}?", "I need {a} times {b}."),
    ),
    "two": (
        (
            "What are {x} and {y}?",
            "Compute {x} and {y}.",
            "How much is {x}, and how much is {y}?",
            "Please tell me {x} and {y}.",
            "What is {x}, and what is {y}?",
            "Calculate {x} and also {y}.",
        ),
        ("I need {x} and {y}.", "Compute both {x} and {y}."),
    ),
    "add, multiply": (
        (
            "Add {a} and {b}, then multiply the result by {c}.",
            "What is the sum of {a} and {b}, times {c}?",
            "What is ({a} + {b}) * {c}?",
            "Compute {a} plus {b}, then multiply by {c}.",
        ),
        ("Please add {a} and {b}, then multiply the result by {c}.", "How much is ({a} + {b}) * {c}?"),
    ),
    LIST: (
        (
            'Which files are in "{d}"?',
            'List "{d}".',
            'List the files in "{d}".',
            'What is in the directory "{d}"?',
            'Show me the files in "{d}".',
            'Please list the directory "{d}".',
            "List {d}.",
            "Which files are in {d}?",
        ),
        ('What files does "{d}" have?', 'Can you list "{d}"?'),
    ),
    READ: (
        (
            'Read "{p}".',
            'What does "{p}" say?',
            'What is in the file "{p}"?',
            'Show me the file "{p}".',
            'Please read the file "{p}".',
            'Open "{p}".',
            "Read {p}.",
            "What does {p} say?",
        ),
        ('Can you read "{p}"?', 'Tell me what "{p}" says.'),
    ),
    "read two": (
        (
            'Read "{p}" and "{q}".',
            'What do "{p}" and "{q}" say?',
            'Show me the files "{p}" and "{q}".',
            'Please read "{p}" and also "{q}".',
        ),
        ('Can you read "{p}" and "{q}"?', 'I need "{p}" and "{q}".'),
    ),
    "read the first": (
        (
            'Read the first file in "{d}".',
            'What does the first file in "{d}" say?',
            'Show me the first file of "{d}".',
            'Open the first file in "{d}".',
        ),
        ('Can you read the first file in "{d}"?', 'Please read the first file of "{d}".'),
    ),
    "greeting": (
        ("Hello!", "Hi.", "Hello.", "Good morning.", "Hi there!", "Good evening!", "Hello, how are you?", "Hey!"),
        ("Hello there!", "Good afternoon."),
    ),
}
"""By kind: what is trained on, and what is held out."""

_NEEDS: dict[str, set[str]] = {
    ADD: {ADD},
    MULTIPLY: {MULTIPLY},
    "two": {ADD, MULTIPLY},
    "add, multiply": {ADD, MULTIPLY},
    LIST: {LIST},
    READ: {READ},
    "read two": {READ},
    "read the first": {LIST, READ},
    "greeting": set(),
}
_WEIGHTS = {
    ADD: 3,
    MULTIPLY: 3,
    "two": 5,
    "add, multiply": 3,
    LIST: 4,
    READ: 4,
    "read two": 4,
    "read the first": 4,
    "greeting": 1,
}
KINDS = tuple(_WEIGHTS)


class Turn(NamedTuple):
    reasoning: str
    calls: tuple[Call, ...] = ()
    answer: str = ""


class Task(NamedTuple):
    """One round: the question, and the assistant's turns, of which the last one answers."""

    kind: str
    question: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Conversation:
    kind: str
    """Of the last round."""
    messages: tuple[dict[str, Any], ...]
    """From the system prompt to the last answer, as `/v1/chat/completions` has them."""
    files: Files
    thinking: bool


class Source:
    """Draws conversations. Those held out have other phrasings, other numbers together, and other made-up words; real
    words are the same ones, in other places."""

    def __init__(self, seed: int, held_out: bool, made_up: float = 0.4) -> None:
        """made_up: the share of words that are no real ones."""
        self.draw = random.Random(f"{seed} {held_out}")
        self._held_out, self._made_up = held_out, made_up

    def conversation(self, names: set[str], kind: str | None = None) -> Conversation:
        """names: of the tools that are declared; kind: any that they are enough for, if not given."""
        draw = self.draw
        directories = {self._directory(): self._files() for _ in range(2)}
        if draw.random() < 0.2:
            directories[""] = self._files()
        files = Files(directories)
        thinking = draw.random() < 0.85
        messages: list[dict[str, Any]] = []
        if draw.random() < 0.3:
            messages.append({"role": "system", "content": draw.choice(_SYSTEM)})
        task = self._task(files, names, None) if draw.random() < 0.15 else None
        if task is not None:
            messages += _round(task, files, thinking)
        last = self._task(files, names, kind)
        messages += _round(last, files, thinking)
        return Conversation(last.kind, tuple(messages), files, thinking)

    # -- values ------------------------------------------------------------------------------------------

    def _word(self) -> str:
        if self.draw.random() >= self._made_up:
            return self.draw.choice(_WORDS)
        while True:
            word = "".join(self.draw.choice(_PIECES) for _ in range(self.draw.randint(1, 2)))
            if _is_held_out(word) == self._held_out:
                return word

    def _directory(self) -> str:
        return self._word() if self.draw.random() < 0.85 else f"{self._word()}/{self._word()}"

    def _files(self) -> dict[str, str]:
        return {self._file(): self._text() for _ in range(self.draw.randint(1, 3))}

    def _file(self) -> str:
        return f"{self._word()}.{self.draw.choice(_EXTENSIONS)}"

    def _text(self) -> str:
        draw = self.draw
        if draw.random() < 0.25:
            return f"{self._word()} = {draw.randint(0, 999)}"
        return " ".join(self._word() for _ in range(draw.randint(1, 3)))

    def _numbers(self, count: int) -> list[int]:
        """Which of them come together is held out or not."""
        while True:
            numbers = [self.draw.randint(0, 999 if self.draw.random() < 0.1 else 99) for _ in range(count)]
            if _is_held_out(" ".join(map(str, numbers))) == self._held_out:
                return numbers

    def _path(self, files: Files) -> str:
        """Of a file that is there, or, one time in five, is not."""
        directory = self.draw.choice(list(files.directories))
        file = self._file() if self.draw.random() < 0.2 else self.draw.choice(list(files.directories[directory]))
        return _joined(directory, file)

    def _listed(self, files: Files) -> str:
        """A directory that is there, or, one time in five, is not."""
        present = [name for name in files.directories if name]
        return self._directory() if self.draw.random() < 0.2 else self.draw.choice(present)

    # -- tasks -------------------------------------------------------------------------------------------

    def _task(self, files: Files, names: set[str], kind: str | None) -> Task:
        possible = {each: weight for each, weight in _WEIGHTS.items() if _NEEDS[each] <= names}
        kind = kind or self.draw.choices(list(possible), list(possible.values()))[0]
        phrasing = self.draw.choice(_PHRASINGS[kind][self._held_out])
        if kind == "greeting":
            return Task(kind, phrasing, (Turn("No tool is needed.", answer="Hello! What can I do for you?"),))
        if kind in (ADD, MULTIPLY, "two", "add, multiply"):
            return self._arithmetic(kind, phrasing, files)
        return self._reading(kind, phrasing, files)

    def _arithmetic(self, kind: str, phrasing: str, files: Files) -> Task:
        if kind == "two":
            names = [self.draw.choice((ADD, MULTIPLY)) for _ in range(2)]
            calls = tuple(_numbers_call(name, *self._numbers(2)) for name in names)
            words = self.draw.random() < 0.5
            x, y = (_spoken(call) if words else _formula(call) for call in calls)
            r, s = map(files.result, calls)
            first = Turn(f"I need {_formula(calls[0])} and {_formula(calls[1])}.", calls)
            answer = f"{_formula(calls[0])} = {r}\n{_formula(calls[1])} = {s}"
            return Task(kind, phrasing.format(x=x, y=y), (first, Turn(f"The results are {r} and {s}.", answer=answer)))
        if kind == "add, multiply":
            a, b, c = self._numbers(3)
            add = _numbers_call(ADD, a, b)
            r = files.result(add)
            multiply = _numbers_call(MULTIPLY, int(r), c)
            s = files.result(multiply)
            steps = (
                Turn(f"First I need {_formula(add)}.", (add,)),
                Turn(f"The result is {r}. Now I need {_formula(multiply)}.", (multiply,)),
                Turn(f"The result is {s}.", answer=f"({_formula(add)}) * {c} = {s}"),
            )
            return Task(kind, phrasing.format(a=a, b=b, c=c), steps)
        a, b = self._numbers(2)
        call = _numbers_call(kind, a, b)
        r = files.result(call)
        turns = (
            Turn(f"I need {_formula(call)}.", (call,)),
            Turn(f"The result is {r}.", answer=f"{_formula(call)} = {r}"),
        )
        return Task(kind, phrasing.format(a=a, b=b), turns)

    def _reading(self, kind: str, phrasing: str, files: Files) -> Task:
        if kind == READ:
            path = self._path(files)
            call = Call(READ, {"path": path})
            return Task(kind, phrasing.format(p=path), (Turn("I read the file.", (call,)), _told(files, call)))
        if kind == "read two":
            paths = [self._path(files)]
            while len(paths) < 2:
                paths += {self._path(files)} - {*paths}
            calls = tuple(Call(READ, {"path": path}) for path in paths)
            first = Turn("I read both files.", calls)
            return Task(kind, phrasing.format(p=paths[0], q=paths[1]), (first, _told(files, *calls)))
        directory = self._listed(files)
        call = Call(LIST, {"directory": directory})
        listing = files.result(call)
        first, question = Turn("I list the directory.", (call,)), phrasing.format(d=directory)
        if kind == LIST or listing.startswith(ERROR):
            return Task(kind, question, (first, _told(files, call)))
        path = _joined(directory, listing.split("\n")[0])
        read = Call(READ, {"path": path})
        return Task(
            kind, question, (first, Turn("I have the list. Now I read the first file.", (read,)), _told(files, read))
        )


def _told(files: Files, *calls: Call) -> Turn:
    """The answer with what was listed or read, to the letter, or with why it was not."""
    results = [files.result(call) for call in calls]
    names = ("The first file", "The second file") if len(calls) > 1 else ("The file",)
    parts = []
    for name, call, result in zip(names, calls, results, strict=True):
        if result.startswith(ERROR):
            parts.append(f"I cannot {'list' if call.name == LIST else 'read'} it: {result.removeprefix(ERROR)}.")
        else:
            parts.append(f"The files are:\n{result}" if call.name == LIST else f"{name} says:\n{result}")
    failed = any(result.startswith(ERROR) for result in results)
    return Turn("It failed." if failed else "I have the result.", answer="\n".join(parts))


def _round(task: Task, files: Files, thinking: bool) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": task.question}]
    for turn in task.turns:
        message: dict[str, Any] = {"role": "assistant", "content": turn.answer}
        if thinking:
            message["reasoning_content"] = turn.reasoning
        if turn.calls:
            calls = [{"name": call.name, "arguments": call.arguments} for call in turn.calls]
            message["tool_calls"] = [
                {"type": "function", "id": f"call_{index}", "function": call} for index, call in enumerate(calls)
            ]
        messages.append(message)
        messages += [
            {"role": "tool", "tool_call_id": f"call_{index}", "content": files.result(call)}
            for index, call in enumerate(turn.calls)
        ]
    return messages


def _numbers_call(name: str, a: int, b: int) -> Call:
    return Call(name, {"a": a, "b": b})


def _formula(call: Call) -> str:
    return f"{call.arguments['a']} {'+' if call.name == ADD else '*'} {call.arguments['b']}"


def _spoken(call: Call) -> str:
    return f"{call.arguments['a']} {'plus' if call.name == ADD else 'times'} {call.arguments['b']}"


def _joined(directory: str, file: str) -> str:
    return f"{directory}/{file}" if directory else file


def names_of(tools: Sequence[dict[str, Any]]) -> set[str]:
    return {tool["function"]["name"] for tool in tools}
