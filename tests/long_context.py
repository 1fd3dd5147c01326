"""A model so small that a CPU fills a long context with it, and what it answers there."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.drafting.gate import draft_chains, walk
from longcat_core.reference import LatentCache, LongcatForCausalLM
from tests.cases import DEFAULT, Case, drafting_tensors
from tests.speculation import Speculated

NEW_TOKENS, DRAFTS = 24, 2
CHUNK = 2048
"""Tokens of a prompt that an engine takes at once."""
_ROOM = 64
"""Positions that a prompt leaves for its answer, what is said next, and the answer to that."""


def config_of(context: int) -> LongcatConfig:
    return replace(
        DEFAULT,
        vocab_size=64,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=1,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        ffn_hidden_size=32,
        expert_ffn_hidden_size=16,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        max_position_embeddings=context,
    )


def tensors_of(config: LongcatConfig) -> dict[str, Tensor]:
    return drafting_tensors(config, disagreement=2.0)


def prompt_of(context: int) -> list[int]:
    return Case(config_of(context)).prompts(1, context - _ROOM)[0]


@dataclass(frozen=True)
class Conversation:
    """A prompt that leaves no more than `_ROOM` positions of the context, and the prompt of its continuation."""

    prompt: list[int]
    answer: Speculated
    next_prompt: list[int]
    next_answer: Speculated
    next_log_softmax: Tensor
    """Of the logits from which the next answer's tokens are chosen: fp32 [NEW_TOKENS, vocabulary]."""


def conversation(context: int) -> Conversation:
    """What the reference answers greedily, with `DRAFTS` drafts a step. All of `next_prompt` but its last token has
    been computed by then."""
    config = config_of(context)
    model = ReferenceInChunks(config)
    model.load_published(tensors_of(config))
    prompt = prompt_of(context)
    continuation = model.generate(prompt, 2 * NEW_TOKENS + DRAFTS)
    next_prompt = prompt + continuation[:NEW_TOKENS]
    with torch.no_grad():
        accepted = draft_chains(model, prompt, continuation, DRAFTS).accepted.tolist()
        logits, _, _ = model(torch.tensor([prompt + continuation]))
    log_softmax = logits[0, len(next_prompt) - 1 :][:NEW_TOKENS].log_softmax(dim=-1)

    def answer(first: int) -> Speculated:
        steps = [step for step in walk(accepted[first:], DRAFTS) if step.position + 1 < NEW_TOKENS]
        taken = [min(step.accepted, NEW_TOKENS - 2 - step.position) for step in steps]
        return Speculated(continuation[first : first + NEW_TOKENS], taken)

    return Conversation(prompt, answer(0), next_prompt, answer(NEW_TOKENS), log_softmax)


class ReferenceInChunks(LongcatForCausalLM):
    """The reference, which takes a prompt of 131,072 tokens at once for scores of [131,072, 131,072]. What it has
    computed of its last prompt is kept, so that a longer one only adds to it."""

    _CHUNK = 128

    def __init__(self, config: LongcatConfig) -> None:
        super().__init__(config)
        self.eval()
        self._known = torch.empty(1, 0, dtype=torch.int64)
        self._computed: tuple[Tensor, Tensor, LatentCache] | None = None

    def forward(self, input_ids: Tensor, past: LatentCache | None = None) -> tuple[Tensor, Tensor, LatentCache]:
        if past is not None:
            return super().forward(input_ids, past)
        known = self._known.shape[1]
        if self._computed is None or not torch.equal(input_ids[:, :known], self._known):
            known = 0
        parts = [self._computed] if self._computed is not None and known else []
        for chunk in input_ids[:, known:].split(self._CHUNK, dim=1) if known < input_ids.shape[1] else ():
            parts.append(super().forward(chunk, parts[-1][2] if parts else None))
        self._known, self._computed = input_ids, _joined(parts)
        return self._computed

    def draft(
        self, hidden: Tensor, next_tokens: Tensor, past: LatentCache | None = None
    ) -> tuple[Tensor, Tensor, LatentCache]:
        parts: list[tuple[Tensor, Tensor, LatentCache]] = []
        for some, tokens in zip(hidden.split(self._CHUNK, dim=1), next_tokens.split(self._CHUNK, dim=1), strict=True):
            parts.append(super().draft(some, tokens, parts[-1][2] if parts else past))
        return _joined(parts)


def _joined(parts: list[tuple[Tensor, Tensor, LatentCache]]) -> tuple[Tensor, Tensor, LatentCache]:
    logits, hidden, caches = zip(*parts, strict=True)
    return torch.cat(logits, dim=1), torch.cat(hidden, dim=1), caches[-1]
