"""What speculation has to do: the drafts that the reference makes, and how many of them the target accepts."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from longcat_core.drafting.gate import Chains, DraftGate, Step, draft_chains, walk
from longcat_core.reference import LongcatForCausalLM
from tests.cases import CASES, Case, drafting_tensors

CASE = CASES["default"]
NEW_TOKENS = 24
MOST_DRAFTS = 4
"""Drafts a step, at most, in the tests."""


class Speculated(NamedTuple):
    """What an engine says of a request that it answered with speculation; each engine finds it out its own way."""

    tokens: list[int]
    accepted: list[int]
    """Drafts accepted in each verification, in order; the last counts only what was still asked for."""


@cache
def reference_of(case: Case) -> LongcatForCausalLM:
    model = LongcatForCausalLM(case.config)
    model.load_published(drafting_tensors(case.config))
    return model.eval()


@cache
def chains_of(case: Case, prompt: tuple[int, ...], new_tokens: int) -> tuple[list[int], Chains]:
    """The greedy continuation, and what is drafted after each of its tokens."""
    model = reference_of(case)
    continuation = model.generate(list(prompt), new_tokens + MOST_DRAFTS)
    with torch.no_grad():
        return continuation[:new_tokens], draft_chains(model, list(prompt), continuation, MOST_DRAFTS)


def steps_of(
    case: Case, prompt: list[int], new_tokens: int, draft_tokens: int, gate: DraftGate | None = None
) -> list[Step]:
    """The verifications of a greedy answer, with `draft_tokens` drafts each, of which the gate prunes some."""
    _, chains = chains_of(case, tuple(prompt), new_tokens)
    kept = draft_tokens if gate is None else gate.kept(chains.features[:, :draft_tokens])
    return [step for step in walk(chains.accepted, kept) if step.position + 1 < new_tokens]


def truth(
    case: Case, prompt: list[int], new_tokens: int, draft_tokens: int, gate: DraftGate | None = None
) -> Speculated:
    """What an engine has to answer."""
    continuation, _ = chains_of(case, tuple(prompt), new_tokens)
    steps = steps_of(case, prompt, new_tokens, draft_tokens, gate)
    return Speculated(continuation, [min(step.accepted, new_tokens - 2 - step.position) for step in steps])


def accepted_by_position(steps: Sequence[Step], draft_tokens: int) -> list[int]:
    """How many verifications accepted the draft at each position of its chain."""
    return [sum(step.accepted > position for step in steps) for position in range(draft_tokens)]


def prompts_of(case: Case) -> list[list[int]]:
    """Mixed lengths; the last shares its first 64 tokens with the one before."""
    mixed = [case.prompts(1, length, seed=length)[0] for length in (1, 3, 17, 40, 70)]
    return [*mixed, mixed[-1][:64] + mixed[1]]


@cache
def the_gate(case: Case = CASE) -> DraftGate:
    """A gate that goes by every feature, prunes a part of the case's first drafts and more of later ones, and
    decides none of these by a hair."""
    gate = DraftGate().requires_grad_(False)
    for parameter in gate.parameters():
        parameter.zero_()
    gate.hidden.weight[:3] = torch.eye(3)
    gate.output.weight[0, :3] = torch.tensor([6.0, -0.5, -0.1])  # of the path's probability, entropy, depth
    chains = [chains_of(case, tuple(prompt), NEW_TOKENS)[1] for prompt in prompts_of(case)]
    scores = torch.cat([gate(each.features) for each in chains])
    first = scores[:, 0].quantile(torch.tensor([0.1, 0.33]))
    middle = scores[(scores >= first[0]) & (scores <= first[1])].unique()
    widest = int(middle.diff().argmax())
    gate.threshold = float(middle[widest : widest + 2].mean())
    return gate
