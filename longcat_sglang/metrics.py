"""What SGLang's `/metrics` show of LongCat's own: experts that tokens take, the dial, accepted drafts by position."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from prometheus_client import Counter
from sglang.srt.layers.dp_attention import dp_gather_replicate, is_dp_attention_enabled
from sglang.srt.layers.moe.utils import get_moe_a2a_backend
from sglang.srt.runtime_context import (
    get_exec,
    get_observability,
    get_parallel,
    get_serving,
    max_speculative_num_draft_tokens,
)
from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.dial import DialledRouters
from longcat_core.observation.expert_choices import ExpertChoices
from longcat_core.observation.publication import Publication
from longcat_sglang import placement

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.utils import GenerationBatchResult
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)

ACCEPTED, VERIFIED = "longcat:accepted_drafts", "longcat:verified_chains"


def are_counted_here() -> bool:
    """Whether this rank counts choices: with --enable-metrics, the first of those whose MoE has the same rows; and all
    where the first does not know by itself which rows are tokens."""
    if not get_observability().enable_metrics or not (_shows_counts() or _gathers_tokens()):
        return False
    if get_exec().features.enable_memory_saver:
        logger.warning("The experts that tokens take are not counted with --enable-memory-saver yet.")
        return False
    return True


def _shows_counts() -> bool:
    """Whether no other rank's MoE has the same rows and shows what it counts."""
    return get_parallel().tp_rank == 0 or not get_moe_a2a_backend().is_none()


def _gathers_tokens() -> bool:
    """Whether a MoE has the rows of requests of other ranks too."""
    return is_dp_attention_enabled() and get_parallel().attn_dp_size > 1 and get_moe_a2a_backend().is_none()


FIRST_SLOT = 1
"""A row is a token if its slot in the cache is this or a later one: slot 0 is SGLang's for rows that pad a captured
graph, and for all rows of a capture and of a warm-up."""


def slots_of(forward_batch: ForwardBatch) -> Tensor:
    """int64 [T], of the rows that a MoE has. Where these are of other ranks too, 1 for a token and 0 for another row:
    each rank says which of its own are tokens, so that all have to ask. In front of an all-to-all each has a share of
    the rows that it attends to with others, as even as can be (layers/layer_boundary/ops.py)."""
    own = forward_batch.out_cache_loc
    if not get_moe_a2a_backend().is_none():
        return own.tensor_split(get_parallel().attn_tp_size)[get_parallel().attn_tp_rank]
    if not _gathers_tokens():
        return own
    assert forward_batch.global_dp_buffer_len is not None, "ranks have told each other how many rows they have"
    rows = own.new_zeros(forward_batch.global_dp_buffer_len, 1, dtype=torch.float32)
    dp_gather_replicate(rows, (own >= FIRST_SLOT).float().unsqueeze(1), forward_batch)
    return rows.squeeze(1).long()


def rows_that_are_tokens(slots: Tensor) -> Tensor:
    """int64 [T], 1 for a token. slots: as of `slots_of`."""
    return (slots >= FIRST_SLOT).long()


class CountedChoices:
    """The choices of this rank's layers, from the batch of each step; and their dial, if they have one."""

    def __init__(self, config: LongcatConfig, dialled: DialledRouters | None = None) -> None:
        ranks = get_parallel().moe_ep_size
        device = torch.get_default_device()
        layers = range(config.num_layers)
        num_places = placement.num_places(config)
        self._choices = ExpertChoices(layers, config.moe_topk, num_places, ranks, device, FIRST_SLOT)
        directory = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])  # which --enable-metrics sets in all processes
        dial = None if dialled is None else dialled.dial
        self.publication = Publication(self._choices, directory, _labels(), dial) if _shows_counts() else None

    def add(self, choices: list[Tensor], slots: Tensor) -> None:
        """choices: int32 [T, K] of each layer, by place; slots: as of `slots_of`."""
        self._choices.add(choices, slots)


def _labels() -> dict[str, str]:
    return {"model_name": get_serving().served_model_name}


def begin_when_warm(original: Callable[..., Any], scheduler: Scheduler, *args: Any, **kwargs: Any) -> Any:
    """Show the counts from when the last graph is captured."""
    runner: Any = scheduler.tp_worker.model_runner
    counted: CountedChoices | None = getattr(runner.model.model, "counted", None)
    if counted is not None and counted.publication is not None:
        counted.publication.begin()
    return original(scheduler, *args, **kwargs)


class AcceptedDrafts:
    """Verified chains of drafts, and how many drafts of them were accepted at each position."""

    def __init__(self) -> None:
        labels = _labels()
        of_chains = Counter(VERIFIED, "Chains of drafts that were verified.", labelnames=[*labels])
        self._chains = of_chains.labels(**labels)
        of_drafts = Counter(
            ACCEPTED, "Drafts that were accepted, by their position in a chain.", labelnames=[*labels, "position"]
        )
        # Not the steps: --speculative-adaptive changes them, and a chain of n-grams may be longer.
        most_tokens = max_speculative_num_draft_tokens()
        assert most_tokens is not None, "drafts are verified"
        self._at = [of_drafts.labels(**labels, position=str(position)) for position in range(most_tokens - 1)]

    def add(self, accepted: Sequence[int]) -> None:
        """accepted: leading drafts of each chain."""
        self._chains.inc(len(accepted))
        for position, counter in enumerate(self._at):
            counter.inc(sum(length > position for length in accepted))


@cache
def _accepted_drafts() -> AcceptedDrafts | None:
    """Counted once by a process that shows metrics, of those that verify the same."""
    is_counting = get_observability().enable_metrics and get_parallel().attn_tp_rank == 0
    return AcceptedDrafts() if is_counting else None


def note_accepted_drafts(
    original: Callable[..., Any], processor: Any, result: GenerationBatchResult, batch: ScheduleBatch, **kwargs: Any
) -> Any:
    """As the results of a verification are read, after which SGLang keeps sums over positions only."""
    tokens = original(processor, result, batch, **kwargs)
    accepted, counted = result.num_correct_drafts_per_req_cpu, _accepted_drafts()
    if counted is not None and accepted is not None:
        pairs = zip(accepted, batch.reqs, strict=True)
        counted.add([length for length, request in pairs if not (request.is_retracted or request.finished())])
    return tokens
