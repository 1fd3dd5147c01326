"""Fine-tuning on conversations: the run of `examples.nano.trainer`, but on the assistant's own tokens alone."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from examples.nano import publish
from examples.nano.balance import Routed, Watch
from examples.nano.settings import Settings
from examples.nano.tools.conversations import Source, names_of
from examples.nano.tools.domain import drawn_tools, tools
from examples.nano.tools.rendering import Tokens, encode
from examples.nano.trainer import Part, Trainer
from longcat_core.inspection import routers
from longcat_core.reference import MTP, LatentCache, LongcatForCausalLM

_POOL = 4
"""As many parts are drawn at once and sorted by length, so that a part's conversations are of about one length."""


class Batch(NamedTuple):
    """Conversations in which the same tools are declared in the same words."""

    declaration: Tensor
    """int64 [D]: what all of them begin with."""
    ids: Tensor
    """int64 [conversations, T]: what follows, the shorter ones begun again to fill their rows."""
    said: Tensor
    """bool [conversations, T]: whether a token is the assistant's own."""


def batch(conversations: Sequence[Tokens]) -> Batch:
    """Of conversations with one declaration."""
    declared = conversations[0].declared
    rest = [(each.ids[declared:], each.said[declared:]) for each in conversations]
    longest = max(len(ids) for ids, _ in rest)
    # Tokens of padding would all go to the same experts, and mislead what balances them.
    filled = [(ids * (longest // len(ids) + 1))[:longest] for ids, _ in rest]
    said = [own + [False] * (longest - len(own)) for _, own in rest]
    return Batch(torch.tensor(conversations[0].ids[:declared]), torch.tensor(filled), torch.tensor(said))


def drawn(tokenizer: Tokenizer, source: Source, declared: Sequence[dict[str, Any]], count: int) -> list[Tokens]:
    """Conversations about some tools, encoded."""
    names = names_of(declared)
    conversations = (source.conversation(names) for _ in range(count))
    return [encode(tokenizer, each.messages, declared, each.thinking) for each in conversations]


def batches(tokenizer: Tokenizer, settings: Settings) -> list[Batch]:
    """What every part of every step learns from, in order: each with a declaration of its own, in one of three as
    `domain.tools` has it."""
    size = settings.batch_size // settings.parts
    source = Source(settings.seed, held_out=False, made_up=0.7)
    made: list[Batch] = []
    while len(made) < settings.steps * settings.parts:
        declared = tools() if source.draw.random() < 1 / 3 else drawn_tools(source.draw)
        found = sorted(drawn(tokenizer, source, declared, _POOL * size), key=lambda each: len(each.ids))
        made += [batch(found[first : first + size]) for first in range(0, len(found), size)]
    # Else those of one declaration, and long ones, come one after the other.
    random.Random(settings.seed).shuffle(made)
    return made[: settings.steps * settings.parts]


def widened(model: LongcatForCausalLM, vocab_size: int, seed: int, new: Sequence[int]) -> LongcatForCausalLM:
    """A model with rows for more tokens; those of `new` ids, seen for the first time, are drawn as widely spread as
    the others are."""
    larger = LongcatForCausalLM(model.config.__class__(**(vars(model.config) | {"vocab_size": vocab_size})))
    generator = torch.Generator().manual_seed(seed)
    state, rows = model.state_dict(), torch.tensor(new)
    for name, parameter in larger.state_dict().items():
        old = state[name]
        if old.shape == parameter.shape:
            parameter.copy_(old)
        else:
            parameter[: len(old)] = old
            parameter[rows] = float(old.std()) * torch.randn(len(new), old.shape[1], generator=generator)
    return larger


class ToolTrainer(Trainer):
    """Goes on from a trained model, whose routers' biases it keeps steering, and later on from its MTP layer."""

    def __init__(
        self,
        settings: Settings,
        model: LongcatForCausalLM,
        found: Sequence[Batch],
        tags: Sequence[int],
        threads: int = 1,
    ) -> None:
        """model: with its MTP layer; found: one for each part of each step; tags: ids that the model has not seen."""
        text = torch.cat([each.ids.flatten() for each in found]).int()
        super().__init__(settings, text, torch.device("cpu"), threads)
        self.parts, self._tags = found, list(tags)
        self._mtp, model.model.mtp = model.model.mtp, None
        self.model = model.train()
        self.controller.begin_at(torch.stack([router.e_score_correction_bias for router in routers(model)]))
        self.optimizer = self._new_optimizer()

    def _new_draft_layer(self) -> MTP:
        """The trained one, which knows of the tags what the model has learned since."""
        assert self._mtp is not None
        self._mtp.embed_tokens.weight.data[self._tags] = self.model.model.embed_tokens.weight.data[self._tags]
        return self._mtp

    def write(self, directory: Path) -> None:
        """The checkpoint as it is now, with its MTP layer."""
        mtp = self.model.model.mtp
        try:
            self.model.model.mtp = mtp or self._new_draft_layer()
            publish.write(self.model, directory)
        finally:
            self.model.model.mtp = mtp

    def _parts(self, watch: Watch) -> list[Part]:
        parts = self.settings.parts
        found = self.parts[self.step * parts :][:parts]
        return list(self._pool.map(self._conversations, range(parts), found, repeat(watch)))

    def _conversations(self, index: int, part: Batch, watch: Watch) -> Part:
        """As `Trainer._part`, with the declaration read once for all conversations of the part, which begin with it:
        nothing is learned from it but how to read what follows."""
        model, rows = self.model, len(part.ids)
        draft_losses: list[Tensor] = []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16, cache_enabled=False):
            with torch.no_grad():
                _, declared, past = model(part.declaration.unsqueeze(0))
            routed = watch.take()
            logits, hidden, _ = model(part.ids, _repeated(past, rows))
            routed = [Routed(both.rows + one.rows, both.loss) for one, both in zip(routed, watch.take(), strict=True)]
            if model.model.mtp is not None:
                with torch.no_grad():
                    _, _, draft_past = model.draft(declared[:, :-1], part.declaration[1:].unsqueeze(0))
                before = torch.cat((declared[:, -1:].expand(rows, -1, -1), hidden[:, :-1]), dim=1)
                draft_losses = self._chains(before, part, logits, _repeated(draft_past, rows), index)
        own = part.said[:, 1:]
        loss = F.cross_entropy(logits[:, :-1][own].float(), part.ids[:, 1:][own])
        return self._learned(loss, draft_losses, routed, len(part.declaration) + part.ids.numel())

    def _chains(self, target: Tensor, part: Batch, logits: Tensor, past: LatentCache, index: int) -> list[Tensor]:
        """The losses of drafts, as `Trainer._draft_losses` has them, where the assistant's own tokens are drafted."""
        settings = self.settings.draft_layer
        # A draft stands beside what the model says likeliest at the same token.
        own = torch.cat((part.said[:, 1:], torch.zeros_like(part.said[:, :1])), dim=1)
        likeliest = logits.argmax(dim=-1)[own]
        generator = torch.Generator().manual_seed(1_000_003 * self.settings.seed + 2 * self.step + index)
        losses, hidden, output = [], target, target
        for depth in range(settings.depth if self.step % settings.deep_every == 0 else 1):
            if depth:
                shifted = torch.cat((target[:, :1], output[:, :-1]), dim=1)
                takes_own = (torch.rand(part.ids.shape, generator=generator) < 0.5).unsqueeze(-1)
                hidden = torch.where(takes_own, shifted, target)
            drafted, output, _ = self.model.draft(hidden, part.ids, past)
            losses.append(F.cross_entropy(drafted[own].float(), likeliest))
        return losses


def _repeated(past: LatentCache, rows: int) -> LatentCache:
    return [each.expand(rows, -1, -1) for each in past]
