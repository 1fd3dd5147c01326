"""The Nano that calls tools: conversations as servers render them, training on them, and what it has learned."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from examples.nano import training_record
from examples.nano.settings import PRESETS
from examples.nano.tools import domain, measure, tokenizer, train
from examples.nano.tools.conversations import KINDS, Conversation, Source
from examples.nano.tools.domain import Call, Files
from examples.nano.tools.rendering import encode, render
from examples.nano.tools.trainer import ToolTrainer, batch, drawn, widened
from examples.nano.trainer import initialize
from longcat_core.chat.templates import THINKING_2601
from longcat_core.reference import LongcatForCausalLM
from longcat_core.weights import checkpoint
from longcat_nano import CHECKPOINT, TOOLS_CHECKPOINT

RECORD = json.loads(Path(train.__file__).with_name(training_record.FILE).read_text())
NAMES = set(domain.NAMES)
FILES = Files({"garden": {"tulip.txt": "red and tall", "daisy.md": "white"}, "": {"todo.txt": "sow"}})


@pytest.fixture(scope="module")
def read() -> Tokenizer:
    return Tokenizer.from_file(str(TOOLS_CHECKPOINT / "tokenizer.json"))


def conversations(held_out: bool, count: int = 60) -> list[Conversation]:
    source = Source(5, held_out)
    return [source.conversation(NAMES, KINDS[index % len(KINDS)]) for index in range(count)]


# -- conversations ---------------------------------------------------------------------------------------


def test_a_seed_draws_one_set_of_conversations() -> None:
    assert conversations(held_out=False) == conversations(held_out=False)
    assert conversations(held_out=False) != conversations(held_out=True)


def test_no_question_that_is_held_out_is_trained_on() -> None:
    asked = [
        {each.messages[measure.asked(each)]["content"] for each in conversations(held_out, 900)}
        for held_out in (False, True)
    ]
    assert not asked[0] & asked[1]


def test_they_are_rendered_as_transformers_renders_them(read: Tokenizer) -> None:
    served = AutoTokenizer.from_pretrained(TOOLS_CHECKPOINT)
    draw = random.Random(1)
    for each in conversations(held_out=False):
        tools = domain.drawn_tools(draw)
        text = served.apply_chat_template(
            list(each.messages), tools=tools, tokenize=False, enable_thinking=each.thinking
        )
        assert text == render(each.messages, tools, each.thinking, prompt=False)
        assert served(text, add_special_tokens=False).input_ids == read.encode(text).ids


def test_what_is_learned_begins_where_the_servers_prompt_ends(read: Tokenizer) -> None:
    for each in conversations(held_out=True):
        asked = measure.asked(each)
        tokens = encode(read, each.messages, domain.tools(), each.thinking)
        prompts = [
            read.encode(render(each.messages[:place], domain.tools(), each.thinking, prompt=True)).ids
            for place, message in enumerate(each.messages)
            if message["role"] == "assistant" and place > asked
        ]
        begun = [place for place in range(1, len(tokens.ids)) if tokens.said[place] and not tokens.said[place - 1]]
        assert [tokens.ids[:place] for place in begun] == prompts


def test_what_is_learned_is_what_the_assistant_says_since_the_last_question(read: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "2 + 30?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Sum.",
            "tool_calls": [{"id": "c", "function": {"name": "add", "arguments": {"a": 2, "b": 30}}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "32"},
        {"role": "assistant", "content": "32.", "reasoning_content": "Done."},
    ]
    tokens = encode(read, messages, domain.tools(), thinking=True)
    own = [token for token, said in zip(tokens.ids, tokens.said, strict=True) if said]
    assert read.decode(own, skip_special_tokens=False) == (
        "Sum.\n</longcat_think>\n<longcat_tool_call>add\n<longcat_arg_key>a</longcat_arg_key>\n"
        "<longcat_arg_value>2</longcat_arg_value>\n<longcat_arg_key>b</longcat_arg_key>\n"
        "<longcat_arg_value>30</longcat_arg_value>\n</longcat_tool_call>\n</longcat_s>"
        "Done.\n</longcat_think>\n32.</longcat_s>"
    )
    declaration = read.decode(tokens.ids[: tokens.declared], skip_special_tokens=False)
    assert declaration.endswith("</longcat_tool_declare>")


def test_tools_give_results_and_say_what_they_do_not_take() -> None:
    assert FILES.result(Call("add", {"a": 2, "b": 3})) == "5"
    assert FILES.result(Call("multiply", {"a": 2, "b": 3})) == "6"
    assert FILES.result(Call("list_files", {"directory": "garden"})) == "tulip.txt\ndaisy.md"
    assert FILES.result(Call("list_files", {"directory": "shed"})) == "Error: no such directory"
    assert FILES.result(Call("read_file", {"path": "garden/daisy.md"})) == "white"
    assert FILES.result(Call("read_file", {"path": "todo.txt"})) == "sow"
    assert FILES.result(Call("read_file", {"path": "garden/todo.txt"})) == "Error: no such file"
    for call in (Call("add", {"a": "2", "b": 3}), Call("read_file", {}), Call("sing", {})):
        with pytest.raises(ValueError, match=call.name):
            FILES.result(call)


# -- training --------------------------------------------------------------------------------------------


@pytest.fixture
def trainer(read: Tokenizer) -> ToolTrainer:
    settings = PRESETS["tiny"].changed(
        {
            "model.vocab_size": read.get_vocab_size(),
            "bf16": False,
            "steps": 12,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "draft_layer.begins": 0.0,
        }
    )
    torch.manual_seed(0)
    model = LongcatForCausalLM(settings.model.config())
    initialize(model)
    found = drawn(read, Source(0, held_out=False), domain.tools(), 4)
    parts = [batch(found[:2]), batch(found[2:])]
    return ToolTrainer(settings, model, parts * settings.steps, tokenizer.ids(read))


@torch.no_grad()
def test_a_declaration_that_is_read_once_is_as_good_as_read_each_time(trainer: ToolTrainer) -> None:
    """The loss of the first step beside that of whole conversations, on the assistant's tokens alone."""
    losses = []
    for part in trainer.parts[:2]:
        ids = torch.cat((part.declaration.expand(len(part.ids), -1), part.ids), dim=1)
        logits = trainer.model(ids)[0][:, len(part.declaration) : -1]
        own = part.said[:, 1:]
        losses.append(float(torch.nn.functional.cross_entropy(logits[own], part.ids[:, 1:][own])))
    with torch.enable_grad():
        assert trainer.train_step().loss == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_model_and_drafts_learn(trainer: ToolTrainer) -> None:
    first, *_, last = [trainer.train_step() for _ in range(trainer.settings.steps)]
    assert first.draft_loss is not None
    assert last.draft_loss is not None
    assert last.loss < 0.6 * first.loss
    assert last.draft_loss < 0.8 * first.draft_loss


def test_a_widened_model_says_of_old_tokens_what_it_said(read: Tokenizer) -> None:
    model = LongcatForCausalLM.from_checkpoint(CHECKPOINT)
    wide = widened(model, read.get_vocab_size(), 0, tokenizer.ids(read))
    ids = torch.tensor([read.encode("import os\n").ids])
    old = [token for token in range(model.config.vocab_size) if token not in tokenizer.ids(read)]
    torch.testing.assert_close(wide(ids)[0][..., old], model(ids)[0][..., old])


# -- the shipped one -------------------------------------------------------------------------------------


def test_its_directory_is_what_the_command_prints() -> None:
    longcat = Path(sys.executable).with_name("longcat")
    printed = subprocess.run([longcat, "nano", "--tools"], capture_output=True, text=True, check=True, timeout=60)
    assert Path(printed.stdout.strip()).samefile(TOOLS_CHECKPOINT)


def test_it_is_complete_and_at_most_16_mb(read: Tokenizer) -> None:
    config = checkpoint.read_config(TOOLS_CHECKPOINT)
    checkpoint.verify(TOOLS_CHECKPOINT, config, requires_mtp=True)
    assert sum(shard.stat().st_size for shard in checkpoint.shards(TOOLS_CHECKPOINT)) <= 16_000_000
    assert config.vocab_size == read.get_vocab_size()
    assert (TOOLS_CHECKPOINT / "chat_template.jinja").read_text() == THINKING_2601.text


def test_its_record_is_of_these_weights() -> None:
    assert RECORD["sha256"] == training_record.digests(TOOLS_CHECKPOINT)


@pytest.fixture(scope="module")
def player(read: Tokenizer) -> measure.Player:
    return measure.Player(LongcatForCausalLM.from_checkpoint(TOOLS_CHECKPOINT), read)


@pytest.mark.parametrize(
    ("question", "calls", "answer"),
    [
        ("What is 23 times 4?", [[Call("multiply", {"a": 23, "b": 4})]], "92"),
        (
            "What are 12 plus 7 and 3 times 45?",
            [[Call("add", {"a": 12, "b": 7}), Call("multiply", {"a": 3, "b": 45})]],
            "12 + 7 = 19\n3 * 45 = 135",
        ),
        (
            'Read the first file in "garden".',
            [[Call("list_files", {"directory": "garden"})], [Call("read_file", {"path": "garden/rose.md"})]],
            "lamp = 42",
        ),
        ('Read "castle/rose.md".', [[Call("read_file", {"path": "castle/rose.md"})]], "no such file"),
    ],
)
def test_it_goes_from_a_question_over_calls_to_an_answer(
    player: measure.Player, question: str, calls: list[list[Call]], answer: str
) -> None:
    files = Files({"garden": {"rose.md": "lamp = 42", "tulip.txt": "river stone"}})
    played = player.play([{"role": "user", "content": question}], domain.tools(), True, files)
    assert played.calls == [*calls, []]
    assert all(turn.message.reasoning for turn in played.turns)
    assert answer in played.turns[-1].message.content


def test_its_record_says_that_most_calls_are_right_and_most_drafts_accepted() -> None:
    results = RECORD["results"]
    assert results["held_out"]["calls"] >= 0.9
    assert results["held_out"]["answers"] >= 0.9
    assert results["held_out_with_made_up_words"]["calls"] >= 0.85
    assert results["drafts"]["first"] >= 0.9
