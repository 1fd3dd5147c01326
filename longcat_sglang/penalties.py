"""Penalties of what a request has generated, for every token that is sampled: after drafts, each on its own path."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.sampling.penaltylib import (
    BatchedFrequencyPenalizer,
    BatchedMinNewTokensPenalizer,
    BatchedPenalizerOrchestrator,
    BatchedPresencePenalizer,
    BatchedRepetitionPenalizer,
)
from sglang.srt.speculative.eagle_info import EagleVerifyInput
from torch import Tensor

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

UNLIKELY = -1e9
"""Added to the logits of tokens that end a request too early. SGLang adds -inf, which leaves no token at all where a
grammar allows an end and nothing else: drawing one then ends the server."""


@dataclass(frozen=True)
class GeneratedTokenPenalties:
    """Replaces SGLang's orchestrator while a batch runs.

    SGLang's counts one token a step: the last that the scheduler knows. That leaves out all but the last of the drafts
    that a step accepts, and with its overlap of steps it is one token late. Here the tokens are counted anew in every
    step, as vLLM does, so that a request that was retracted from the cache has its penalties too.

    Settings are [R, 1], None where no request has one.
    """

    generated: tuple[Tensor, ...]
    """int64, the tokens of each of R requests so far."""
    frequency: Tensor | None
    presence: Tensor | None
    repetition: Tensor | None
    min_new_tokens: Tensor | None
    ends: Tensor | None
    """fp32 [R, vocabulary]: UNLIKELY for tokens that end a request, which `min_new_tokens` is about, 0 elsewhere."""
    is_required: bool = True

    @classmethod
    def of(cls, orchestrator: BatchedPenalizerOrchestrator) -> GeneratedTokenPenalties:
        """The settings that SGLang's own penalizers hold, with the tokens that its scheduler knows now."""
        prepared = {kind: each for kind, each in orchestrator.penalizers.items() if each.is_prepared()}

        def setting(kind: type, name: str) -> Tensor | None:
            return getattr(prepared[kind], name) if kind in prepared else None

        ends = setting(BatchedMinNewTokensPenalizer, "stop_token_penalties")
        return cls(
            generated=tuple(torch.tensor(request.output_ids, dtype=torch.int64) for request in orchestrator.reqs()),
            frequency=setting(BatchedFrequencyPenalizer, "frequency_penalties"),
            presence=setting(BatchedPresencePenalizer, "presence_penalties"),
            repetition=setting(BatchedRepetitionPenalizer, "repetition_penalties"),
            min_new_tokens=setting(BatchedMinNewTokensPenalizer, "min_new_tokens"),
            ends=None if ends is None else ends.clamp(min=UNLIKELY),
        )

    def apply(self, logits: Tensor, drafts: EagleVerifyInput | None = None) -> None:
        """Penalise logits in place.

        logits: [R, vocabulary], or, of drafts, [R n, vocabulary]: those at every node of each request's tree, the first
        of which is the last token generated. SGLang's order: first what is added, then what is multiplied.
        """
        requests = len(self.generated)
        nodes = logits.view(requests, -1, logits.shape[-1])
        counts = occurrences(self.generated, logits.shape[-1], logits.device).unsqueeze(1).repeat(1, nodes.shape[1], 1)
        lengths = torch.tensor([len(tokens) for tokens in self.generated], device=logits.device).view(-1, 1, 1)
        if drafts is not None:
            before = paths(drafts.retrieve_next_token, drafts.retrieve_next_sibling)
            tokens = drafts.draft_token.view(requests, 1, -1).long().expand_as(before)
            counts.scatter_add_(2, tokens, before.float())
            lengths = lengths + before.sum(dim=2, keepdim=True)
        if self.frequency is not None:
            nodes.sub_(self.frequency.unsqueeze(1) * counts)
        if self.presence is not None:
            nodes.sub_(self.presence.unsqueeze(1) * (counts > 0))
        if self.min_new_tokens is not None and self.ends is not None:
            nodes.add_(self.ends.unsqueeze(1).where(lengths < self.min_new_tokens.unsqueeze(1), 0.0))
        if self.repetition is not None:
            factors = self.repetition.unsqueeze(1).where(counts > 0, 1.0)
            nodes.copy_(torch.where(nodes < 0, nodes * factors, nodes / factors))


def occurrences(tokens: Sequence[Tensor], vocabulary: int, device: torch.device) -> Tensor:
    """fp32 [R, vocabulary]: how often each token is among a request's; from int64 tensors on the host."""
    rows = torch.repeat_interleave(torch.tensor([len(each) for each in tokens]))
    counts = torch.zeros(len(tokens), vocabulary, device=device)
    flat = (rows * vocabulary + torch.cat(tuple(tokens))).to(device)
    return counts.view(-1).scatter_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype)).view_as(counts)


def paths(next_child: Tensor, next_sibling: Tensor) -> Tensor:
    """bool [R, n, n]: the nodes, itself included, that lead from a tree's root to each node, without the root.

    next_child, next_sibling: integer [R, n], both of a later node, or -1. A node that no other points to, as one that
    is pruned, counts as a child of the root; its row is not used.
    """
    requests, width = next_child.shape
    children, siblings = (each.where(each >= 0, width).long() for each in (next_child, next_sibling))
    parents = torch.zeros(requests, width + 1, dtype=torch.int64, device=next_child.device)  # the last, of no node
    led = torch.zeros(requests, width, width, dtype=torch.bool, device=next_child.device)
    every = torch.arange(requests, device=next_child.device)
    for node in range(width):
        parent = parents[:, node].clone()
        if node:
            led[:, node] = led[every, parent]
            led[:, node, node] = True
        parents[every, children[:, node]] = node
        parents[every, siblings[:, node]] = parent
    return led


# -- wrappers of SGLang's functions --------------------------------------------------------------------


def penalties_of_what_was_generated(
    original: Callable[..., SamplingBatchInfo], sampling: SamplingBatchInfo, *args: Any, **kwargs: Any
) -> SamplingBatchInfo:
    """The copy that a batch runs with. SGLang's has penalties that are summed already; this one has the tokens."""
    copy = original(sampling, *args, **kwargs)
    orchestrator = sampling.penalizer_orchestrator
    if orchestrator is None or not orchestrator.is_required:
        return copy
    copy.penalizer_orchestrator = GeneratedTokenPenalties.of(orchestrator)  # type: ignore[assignment]
    copy.acc_additive_penalties = copy.acc_scaling_penalties = None
    return copy


def process_what_is_penalised(
    original: Callable[..., bool], scheduler: Scheduler, batch: ScheduleBatch | None, *args: Any, **kwargs: Any
) -> bool:
    """Whether to process the last batch's tokens before this batch runs, as SGLang does for some grammars."""
    orchestrator = batch.sampling_info.penalizer_orchestrator if batch and batch.sampling_info else None
    if orchestrator is not None and orchestrator.is_required and scheduler.result_queue:
        return True
    return original(scheduler, batch, *args, **kwargs)


def transform_at_every_node(
    original: Callable[..., Any],
    draft: EagleVerifyInput,
    batch: ScheduleBatch,
    logits_output: LogitsProcessorOutput,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Apply penalties and custom processors at every node; `eagle_sample` applies the root's, or none."""
    if not batch.forward_mode.is_idle():
        assert logits_output.next_token_logits is not None
        _transform_at_every_node(draft, batch.sampling_info, logits_output.next_token_logits)
    return original(draft, batch, logits_output, *args, **kwargs)


def _transform_at_every_node(draft: EagleVerifyInput, sampling: SamplingBatchInfo, logits: Tensor) -> None:
    from sglang.srt.layers.sampler import apply_custom_logit_processor

    if isinstance(sampling.penalizer_orchestrator, GeneratedTokenPenalties):
        sampling.penalizer_orchestrator.apply(logits, draft)
    if sampling.has_custom_logit_processor:
        apply_custom_logit_processor(logits, sampling, num_tokens_in_batch=draft.draft_token_num)
