"""The draft worker's part in vLLM: with a gate, drafts that are unlikely to be accepted are pruned (C2T)."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from longcat_core.drafting.gate import DraftGate, draft_features
from longcat_vllm import metrics

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
    from vllm.v1.spec_decode.eagle import EagleProposer

logger = init_logger(f"vllm.{__name__}")

PRUNED = "vllm:spec_decode_num_draft_tokens_pruned"
GATE_SCHEDULER = f"{__name__}.GateScheduler"


class GatedDrafts:
    """What the draft model has drafted in this step, and the gate that judges it.

    Not a module, as a gate's tensors are no weights of the model.
    """

    def __init__(self, gate: DraftGate) -> None:
        self._gate = gate
        self.begin()

    def begin(self) -> None:
        """Forget the last step's drafts."""
        self._features: list[Tensor] = []
        self._log_probability: Tensor | None = None

    def observe(self, logits: Tensor) -> None:
        """logits: [B, vocabulary], of which vLLM drafts the best; once for each draft of a chain, in order."""
        if self._log_probability is None:
            self._log_probability = torch.zeros(len(logits), device=logits.device)
        features, self._log_probability = draft_features(
            logits, logits.argmax(dim=-1), self._log_probability, depth=len(self._features) + 1
        )
        self._features.append(features)

    def passed(self, drafts: Tensor) -> list[list[int]]:
        """drafts: [B, k]. The leading ones of each chain that are worth verifying."""
        if not self._features:
            return drafts.tolist()
        lengths = self._gate.kept(torch.stack(self._features, dim=1)).tolist()
        return [chain[:length] for chain, length in zip(drafts.tolist(), lengths, strict=True)]


def propose_what_passes(original: Callable[..., Any], proposer: EagleProposer, *args: Any, **kwargs: Any) -> Any:
    """Hand on the drafts that the draft model's gate lets pass. The runner takes drafts of different lengths, as
    n-grams have them."""
    gated = getattr(proposer.model, "gated_drafts", None)
    if gated is None:
        return original(proposer, *args, **kwargs)
    gated.begin()
    return gated.passed(original(proposer, *args, **kwargs))


class GateScheduler(Scheduler):
    """vLLM's scheduler, which also counts pruned drafts, and the steps of requests whose drafts were all pruned: vLLM's
    own count of drafts, and so its accepted length, would leave these steps out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model_name = self.vllm_config.model_config.served_model_name
        assert isinstance(model_name, str), "ModelConfig takes the first of several names"
        self._pruned = PrunedDrafts(model_name, engine=self.vllm_config.parallel_config.data_parallel_index)
        self._without_drafts: set[str] = set()
        """Requests that go into their next step with all of their drafts pruned."""
        self._steps_without_drafts = 0

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        super().update_draft_token_ids(draft_token_ids)
        for request_id, drafts in zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True):
            request = self.requests.get(request_id)
            if request is None or request.is_finished() or request.is_prefill_chunk:
                continue
            self._pruned.add(self.num_spec_tokens - len(drafts))
            if not drafts:
                self._without_drafts.add(request_id)

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        stepped = self._without_drafts & scheduler_output.num_scheduled_tokens.keys()
        self._steps_without_drafts = len(stepped)
        # Those that had to wait are yet to step; those that were preempted come back as prompts.
        self._without_drafts -= stepped | scheduler_output.finished_req_ids
        self._without_drafts -= scheduler_output.preempted_req_ids or set()
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_stats(self, spec_decoding_stats: SpecDecodingStats | None = None, *args: Any, **kwargs: Any) -> Any:
        for _ in range(self._steps_without_drafts if self.log_stats else 0):
            spec_decoding_stats = spec_decoding_stats or SpecDecodingStats.new(self.num_spec_tokens)
            spec_decoding_stats.observe_draft(num_draft_tokens=0, num_accepted_tokens=0)
        self._steps_without_drafts = 0
        return super().make_stats(spec_decoding_stats, *args, **kwargs)


class PrunedDrafts:
    """A counter in the server's `/metrics` that another process increments.

    vLLM sends a fixed set of statistics from its scheduler to its server. This one goes through a file, in the format
    and with the collector that prometheus_client has for servers of several processes.
    """

    _values: MmapedDict | None

    def __init__(self, model_name: str, engine: int) -> None:
        directory = metrics.shared_directory()
        if directory is None:
            logger.warning("Drafts that the gate prunes are not counted: no directory is shared with the server.")
            self._values = None
            return
        self._values = MmapedDict(str(directory / f"counter_longcat{os.getpid()}.db"))
        self._key = mmap_key(
            PRUNED,
            f"{PRUNED}_total",
            ["model_name", "engine"],
            [model_name, str(engine)],
            "Number of draft tokens that a gate pruned before verification.",
        )
        self.add(0)

    def add(self, drafts: int) -> None:
        if self._values is None:
            return
        value, _ = self._values.read_value(self._key)
        self._values.write_value(self._key, value + drafts, 0.0)
