"""A dial in an engine turns as one on the reference that takes the same steps, so that their answers are the same."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from longcat_core.dial import GAIN, Dial
from longcat_core.reference import LongcatForCausalLM
from longcat_nano import CHECKPOINT
from tests.cases import CASES, Case
from tests.dialled import CPU, turned
from tests.engines.test_bad_checkpoints import refusal
from tests.harness import engine

CASE, TARGET, ANOTHER_TARGET, NEW_TOKENS = CASES["default"], 1.2, 3.4, 24
PROMPTS = [CASE.prompts(1, length, seed=length)[0] for length in (150, 1, 180, 200, 40)]
"""No two begin alike, so that none is found in the prefix cache."""
RESET_BEFORE, ANOTHER_FROM = 2, 3
"""Prompts before which an administrator turns the dial."""
TEXT = Path(argparse.__file__)


def turn(prompt: int, to_target: Callable[[float], None], to_the_beginning: Callable[[], None]) -> None:
    if prompt == RESET_BEFORE:
        to_the_beginning()
    if prompt == ANOTHER_FROM:
        to_target(ANOTHER_TARGET)


@torch.no_grad()
def answers_of_the_reference(directory: Path) -> tuple[list[list[int]], list[list[int]]]:
    """With the dial, one request after the other, a prompt in one step; and without it."""
    model = LongcatForCausalLM.from_checkpoint(directory)
    without = [model.generate(prompt, NEW_TOKENS) for prompt in PROMPTS]
    answers, dial = [], Dial(CASE.config, TARGET, CASE.config.num_layers, CPU)
    with turned(model, dial):
        for number, prompt in enumerate(PROMPTS):
            turn(number, dial.turn, dial.reset)
            logits, _, cache = model(torch.tensor([prompt]))
            tokens = [int(logits[0, -1].argmax())]
            while len(tokens) < NEW_TOKENS + engine.STEPS_BEHIND_THE_END:
                logits, _, cache = model(torch.tensor([tokens[-1:]]), cache)
                tokens.append(int(logits[0, -1].argmax()))
            answers.append(tokens[:NEW_TOKENS])
    return answers, without


@pytest.mark.parametrize(
    "options",
    [{}, engine.AS_THE_STOCK_COMMAND, {"tensor_parallel": 2, "expert_parallel": True}],
    ids=["eager", "stock", "two ranks"],
)
def test_answers_are_those_of_a_dial_on_the_reference(
    options: dict[str, Any], checkpoint_of: Callable[[Case], Path]
) -> None:
    directory = checkpoint_of(CASE)
    wanted, without = answers_of_the_reference(directory)
    assert wanted != without, "what it does shows"
    answers = []
    with engine.serving(directory, max_model_len=256, **engine.held_at(TARGET), **options) as served:
        for number, prompt in enumerate(PROMPTS):
            turn(number, served.turn_dial, served.reset_dial)
            answers += served.greedy([prompt], NEW_TOKENS)
    assert answers == wanted


def note_choices(file: Path, patch: pytest.MonkeyPatch) -> None:
    """Write the tokens of each step, and how many FFN experts they took in each layer; each moves a dial more."""
    end_step = Dial.end_step
    patch.setattr("longcat_core.dial.GAIN", 6 * GAIN)

    def noting(dial: Dial, ids: Tensor, is_real: Tensor) -> None:
        end_step(dial, ids, is_real)
        taken = ((ids >= 0).sum(dim=-1) * is_real).sum(dim=-1)
        with file.open("a") as lines:
            lines.write(json.dumps([int(is_real.sum()), *taken.tolist()]) + "\n")

    patch.setattr(Dial, "end_step", noting)


@pytest.mark.parametrize("drafts", [None, 2])
def test_nano_is_held_in_bf16(drafts: int | None, tmp_path: Path) -> None:
    """By the engine's default path, decode steps of one kernel a layer included; and where drafts are verified."""
    tokens = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode(TEXT.read_text(encoding="utf-8")).ids
    prompts = [tokens[start : start + 32] for start in range(0, 16 * 64, 64)]
    file = tmp_path / "steps.jsonl"
    options = {"dtype": "bfloat16", "broken": partial(note_choices, file), **engine.held_at(2.5)}
    with engine.serving(CHECKPOINT, draft_tokens=drafts, **options) as served:
        served.greedy(prompts, 200)
    steps = torch.tensor([json.loads(line) for line in file.read_text().splitlines()])
    assert float(steps[0, 1:].sum() / steps[0, 0] / 2) > 3.5, "as published it is about 4"
    decoding = steps[steps[:, 0] == len(prompts) * (1 + (drafts or 0))]
    assert len(decoding) > (150 if drafts is None else 20)
    last = decoding[-len(decoding) // 2 :].sum(dim=0)
    assert (last[1:] / last[0]).tolist() == pytest.approx([2.5, 2.5], rel=0.06)


def note_targets(directory: Path, patch: pytest.MonkeyPatch) -> None:
    """Write the tokens of each step of a rank, its target, and where the dial is after it."""
    end_step = Dial.end_step

    def noting(dial: Dial, ids: Tensor, is_real: Tensor) -> None:
        end_step(dial, ids, is_real)
        with (directory / str(os.getpid())).open("a") as lines:
            lines.write(json.dumps([int(is_real.sum()), dial.target, *dial.biases()]) + "\n")

    patch.setattr(Dial, "end_step", noting)


def test_ranks_turn_between_the_same_steps_as_the_queue_grows_and_shrinks(
    tmp_path: Path, checkpoint_of: Callable[[Case], Path]
) -> None:
    prompts = CASE.prompts(24, 12, seed=7)
    options = engine.held_at([TARGET, ANOTHER_TARGET], full_queue=8)
    options |= {"max_running": 4, "tensor_parallel": 2, "expert_parallel": True}
    options |= engine.in_each_rank(partial(note_targets, tmp_path))
    with engine.serving(checkpoint_of(CASE), **options) as served:
        served.greedy(prompts, 48)
    first, second = [file.read_text().splitlines() for file in tmp_path.iterdir()]
    assert first == second
    steps = [json.loads(line) for line in first]
    targets = [target for tokens, target, *_ in steps if tokens]
    lowest = targets.index(TARGET)
    assert targets[0] == targets[-1] == ANOTHER_TARGET
    assert targets[:lowest] == sorted(targets[:lowest], reverse=True)
    assert targets[lowest:] == sorted(targets[lowest:])


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        (4, "4, wanted more than 0 and less than 4, the FFN experts that a token can have; or leave it out"),
        ([1, 4], "4, wanted more than 0 and less than 4, the FFN experts that a token can have; or leave it out"),
        ([1, 2, 3], "ffn_experts: [1, 2, 3], wanted a number above 0, or two of them"),
        ("3", "ffn_experts: '3', wanted a number above 0"),
        (True, "ffn_experts: True, wanted a number above 0"),
        (-1, "ffn_experts: -1, wanted a number above 0"),
    ],
)
def test_what_cannot_be_held_is_refused_before_a_worker_starts(
    target: Any, complaint: str, checkpoint_of: Callable[[Case], Path]
) -> None:
    assert complaint in refusal(checkpoint_of(CASE), **engine.held_at(target))
