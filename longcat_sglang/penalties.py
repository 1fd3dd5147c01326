"""Penalties of what a request has generated, for every token that is sampled: after drafts, each on its own path."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from sglang.srt.sampling.penaltylib import (
    BatchedFrequencyPenalizer,
    BatchedMinNewTokensPenalizer,
    BatchedPenalizerOrchestrator,
    BatchedPresencePenalizer,
    BatchedRepetitionPenalizer,
)
from sglang.srt.speculative.eagle_info import EagleVerifyInput
from sglang.srt.utils.common import is_pin_memory_available
from torch import Tensor

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

UNLIKELY = -1e9
"""Added to the logits of tokens that end a request too early. SGLang adds -inf, which leaves no token at all where a
grammar allows an end and nothing else: drawing one then ends the server."""


class TokenCounts:
    """How often each token is among those that some requests have generated, kept on the device from step to step.

    What a step adds to a request's tokens is added. Those of a request that was not there in the step before, as of one
    that comes back after it was retracted from the cache, are counted from the first.
    """

    def __init__(self, vocabulary: int, device: torch.device | str) -> None:
        self._counts = torch.zeros(0, vocabulary, device=device)
        self._counted: list[tuple[array[int], int]] = []  # the tokens of each row, and how many of them it has

    def of(self, generated: Sequence[array[int]]) -> Tensor:
        """fp32 [R, vocabulary], not to be kept beyond the next call.

        generated: int64, of each of R requests. What was in an array in the call before must be there still; an array
        that takes another's place is another request's.
        """
        rows = {id(tokens): row for row, (tokens, _) in enumerate(self._counted)}
        no_row = len(rows)
        found = [rows.get(id(tokens), no_row) for tokens in generated]
        if found != list(range(no_row)):
            with_zeros = torch.cat((self._counts, self._counts.new_zeros(1, self._counts.shape[1])))
            self._counts = with_zeros[on_device(found, self._counts.device)]
            counted = [number for _, number in self._counted] + [0]
            self._counted = [(tokens, counted[row]) for tokens, row in zip(generated, found, strict=True)]
        self._add_new()
        return self._counts

    def _add_new(self) -> None:
        new, numbers = array("q"), list[int]()
        for tokens, counted in self._counted:
            new += tokens[counted:]
            numbers.append(len(tokens) - counted)
        if new:
            rows = torch.repeat_interleave(torch.tensor(numbers))
            flat = on_device(
                rows * self._counts.shape[1] + torch.frombuffer(new, dtype=torch.int64), self._counts.device
            )
            self._counts.view(-1).scatter_add_(0, flat, torch.ones_like(flat, dtype=self._counts.dtype))
        self._counted = [(tokens, len(tokens)) for tokens, _ in self._counted]


_COUNTS: WeakKeyDictionary[BatchedPenalizerOrchestrator, TokenCounts] = WeakKeyDictionary()
"""Of the penalised requests of each batch that has some."""


def is_penalised(request: Req) -> bool:
    asked = request.sampling_params
    return (
        asked.frequency_penalty != 0
        or asked.presence_penalty != 0
        or asked.repetition_penalty != 1
        or asked.min_new_tokens > len(request.output_ids)
    )


@dataclass(frozen=True)
class GeneratedTokenPenalties:
    """Replaces SGLang's orchestrator while a batch runs.

    SGLang's counts one token a step: the last that the scheduler knows. That leaves out all but the last of the drafts
    that a step accepts, and with its overlap of steps it is one token late. Here each token that is new is counted, and
    those of a request that was retracted from the cache are counted again.

    Of R requests, P are penalised. Settings are [P, 1], None where no request has one.
    """

    rows: Tensor | None
    """int64 [P]: the requests that are penalised; None for all."""
    counts: Tensor
    """fp32 [P, vocabulary]: how often a request has generated each token."""
    lengths: Tensor
    """int64 [P, 1]: how many tokens it has generated."""
    frequency: Tensor | None
    presence: Tensor | None
    repetition: Tensor | None
    min_new_tokens: Tensor | None
    ends: Tensor | None
    """fp32 [P, vocabulary]: UNLIKELY for tokens that end a request, which `min_new_tokens` is about, 0 elsewhere."""
    is_required: bool = True

    @classmethod
    def of(cls, orchestrator: BatchedPenalizerOrchestrator) -> GeneratedTokenPenalties:
        """The settings that SGLang's own penalizers hold, with the tokens that its scheduler knows now."""
        requests, device = orchestrator.reqs(), orchestrator.device
        numbers = [number for number, request in enumerate(requests) if is_penalised(request)]
        rows = None if len(numbers) == len(requests) else on_device(numbers, device)
        generated = [requests[number].output_ids for number in numbers]
        if (counts := _COUNTS.get(orchestrator)) is None:
            counts = _COUNTS[orchestrator] = TokenCounts(orchestrator.vocab_size, device)
        prepared = {kind: each for kind, each in orchestrator.penalizers.items() if each.is_prepared()}

        def setting(kind: type, name: str) -> Tensor | None:
            return chosen(getattr(prepared[kind], name), rows) if kind in prepared else None

        ends = setting(BatchedMinNewTokensPenalizer, "stop_token_penalties")
        return cls(
            rows=rows,
            counts=counts.of(generated),
            lengths=on_device([len(tokens) for tokens in generated], device).view(-1, 1),
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
        if drafts is None:
            every, counts, lengths = logits.unsqueeze(1), self.counts.unsqueeze(1), self.lengths.unsqueeze(1)
        else:
            next_child = chosen(drafts.retrieve_next_token, self.rows)
            before = paths(next_child, chosen(drafts.retrieve_next_sibling, self.rows))
            width = next_child.shape[1]
            every = logits.view(-1, width, logits.shape[-1])
            tokens = chosen(drafts.draft_token.view(-1, width), self.rows).long().unsqueeze(1).expand_as(before)
            counts = self.counts.unsqueeze(1).repeat(1, width, 1).scatter_add_(2, tokens, before.float())
            lengths = self.lengths.unsqueeze(1) + before.sum(dim=2, keepdim=True)
        nodes = chosen(every, self.rows)
        if self.frequency is not None:
            nodes.sub_(self.frequency.unsqueeze(1) * counts)
        if self.presence is not None:
            nodes.sub_(self.presence.unsqueeze(1) * (counts > 0))
        if self.min_new_tokens is not None and self.ends is not None:
            nodes.add_(self.ends.unsqueeze(1).where(lengths < self.min_new_tokens.unsqueeze(1), 0.0))
        if self.repetition is not None:
            factors = self.repetition.unsqueeze(1).where(counts > 0, 1.0)
            nodes.copy_(torch.where(nodes < 0, nodes * factors, nodes / factors))
        if self.rows is not None:
            every[self.rows] = nodes


def chosen(values: Tensor, rows: Tensor | None) -> Tensor:
    """values: [R, ...]; rows: int64 [P], None for all, of which no copy is made."""
    return values if rows is None else values[rows]


def on_device(values: Tensor | list[int], device: torch.device | str) -> Tensor:
    """int64, from the host, which does not wait for what the device has yet to do."""
    values = torch.as_tensor(values, dtype=torch.int64)
    return (values.pin_memory() if is_pin_memory_available(device) else values).to(device, non_blocking=True)


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
    """The copy that a batch runs with. SGLang's would have the sum of its own penalties, [R, vocabulary]."""
    orchestrator = sampling.penalizer_orchestrator
    assert orchestrator is not None
    if not orchestrator.is_required:
        _COUNTS.pop(orchestrator, None)
        return original(sampling, *args, **kwargs)
    ours: Any = GeneratedTokenPenalties.of(orchestrator)
    return replace(sampling, penalizer_orchestrator=ours)


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
