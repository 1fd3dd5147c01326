"""The draft worker's part in SGLang: with a gate, drafts that are unlikely to be accepted are pruned (C2T)."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from prometheus_client import Counter
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_model, get_observability, get_parallel, get_serving
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.eagle_info import EagleDraftInput, EagleVerifyInput
from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker, EAGLEWorkerV2
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from torch import Tensor

from longcat_core.drafting import gate as drafting
from longcat_core.drafting.gate import draft_features
from longcat_sglang import loading, requested

PRUNED = "sglang:spec_num_drafts_pruned"


class GatedWorker(EAGLEWorkerV2):
    """SGLang's worker for chains of drafts, which verifies as many of a batch as its longest chain that passes a gate.

    Drafts beyond a request's own are computed with the others and never accepted. SGLang makes the first draft of a
    chain right after the verification before it, so the gate judges it then; its finding travels with the request
    as `topk_p`, which has no other use on a chain: the draft's probability, or 0 if it is pruned.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.draft_worker, EagleDraftWorker)
        self._drafter = self.draft_worker
        vars(self._drafter)["is_gated"] = True  # the gate sees the logits of every draft, as the runner makes them
        runner = self._drafter.draft_runner
        directory = loading.local_directory(get_model())
        gate = None if directory is None else drafting.load(directory)
        assert gate is not None, "gated_worker asks for this worker where there is one"
        self._gate = gate.to(self.device)
        self._most = self.speculative_num_draft_tokens - 1
        self._made: list[LogitsProcessorOutput] = []
        """By the draft model in this step, in order."""
        self._first: Tensor | None = None
        self._draft = runner.forward
        runner.forward = self._draft_and_note  # type: ignore[method-assign]
        self._pruned: Counter | None = None
        if get_observability().enable_metrics and get_parallel().tp_rank == 0:
            help_text = "Drafts that a gate pruned; a batch verifies as many as its longest chain all the same."
            labelled = Counter(PRUNED, help_text, labelnames=["model_name"])
            self._pruned = labelled.labels(model_name=get_serving().served_model_name)

    def forward_batch_generation(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> GenerationBatchResult:
        self._made.clear()
        self._first = batch.spec_info.topk_p if isinstance(batch.spec_info, EagleDraftInput) else None
        try:
            result = super().forward_batch_generation(batch, *args, **kwargs)
        finally:
            self._verify_at_most(self._most)
        drafted = result.next_draft_input
        if self._made and drafted is not None:
            logits = self._made[-1].next_token_logits
            assert logits is not None
            drafted.topk_p = self._judge_first(logits, drafted.topk_index)
        return result

    def verify(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> GenerationBatchResult:
        if not batch.forward_mode.is_idle():
            chains = batch.spec_info
            assert isinstance(chains, EagleVerifyInput)
            kept = self._kept(chains)
            longest = int(kept.max())
            if self._pruned is not None:
                self._pruned.inc(self._most * len(kept) - int(kept.sum()))
            shorten(chains, kept, longest)
            self._verify_at_most(longest)
        return super().verify(batch, *args, **kwargs)

    def _draft_and_note(self, forward_batch: ForwardBatch, *args: Any, **kwargs: Any) -> Any:
        output = self._draft(forward_batch, *args, **kwargs)
        assert isinstance(output.logits_output, LogitsProcessorOutput)
        self._made.append(output.logits_output)
        return output

    def _judge_first(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """logits: [R, vocabulary]; tokens: [R, 1], drafted from them. Returns fp32 [R, 1], as the class says."""
        path = torch.zeros(len(logits), device=logits.device)
        features, path = draft_features(logits, tokens.squeeze(1), path, depth=1)
        return (path.exp() * self._gate.kept(features.unsqueeze(1))).unsqueeze(1)

    def _kept(self, chains: EagleVerifyInput) -> Tensor:
        """int64 [R]: how many leading drafts of each chain are worth verifying."""
        assert self._first is not None
        path = self._first.squeeze(1).log()
        drafts = chains.draft_token.view(len(path), -1)[:, 1:]  # after the token that is certain
        kept = (self._first.squeeze(1) > 0).long()
        if self._most > 1:
            judged = []
            for depth, made in enumerate(self._made, start=2):
                assert made.next_token_logits is not None
                features, path = draft_features(made.next_token_logits, drafts[:, depth - 1], path, depth)
                judged.append(features)
            kept += kept * self._gate.kept(torch.stack(judged, dim=1))
        parallel = get_parallel()
        if parallel.tp_size > 1:  # every rank judges, and one decides
            parallel.tp_group.broadcast(kept, src=0)
        return kept

    def _verify_at_most(self, drafts: int) -> None:
        self.speculative_num_draft_tokens = drafts + 1
        self._drafter.speculative_num_draft_tokens = drafts + 1


def shorten(chains: EagleVerifyInput, kept: Tensor, longest: int) -> None:
    """Cut R chains down to `longest` drafts, in place, and end each after its own `kept` [R] ones.

    A chain is a tree whose root is the token that is certain; node n follows node n - 1.
    """
    requests, nodes, width = len(kept), longest + 1, chains.draft_token_num
    chains.draft_token = chains.draft_token.view(requests, width)[:, :nodes].flatten()
    chains.positions = chains.positions.view(requests, width)[:, :nodes].flatten()
    if chains.custom_mask is not None and chains.custom_mask.numel() == requests * width * width:
        chains.custom_mask = chains.custom_mask.view(requests, width, width)[:, :nodes, :nodes].flatten()
    places = torch.arange(requests * nodes, device=kept.device)
    chains.retrieve_index = places.view(requests, nodes)
    chains.retrieve_next_token = chains.retrieve_next_token[:, :nodes].scatter(1, kept.unsqueeze(1), -1)
    chains.retrieve_next_sibling = chains.retrieve_next_sibling[:, :nodes].contiguous()
    chains.draft_token_num = chains.num_tokens_per_req = chains.num_tokens_for_logprob_per_req = nodes
    chains.spec_steps = longest


def gated_worker(
    original: Callable[..., type], algorithm: SpeculativeAlgorithm, server_args: ServerArgs, *args: Any, **kwargs: Any
) -> type:
    """On request, a worker that verifies only what passes the draft gate; `deployment.check` has made sure that there
    is a gate and that nothing prevents its use."""
    worker = original(algorithm, server_args, *args, **kwargs)
    if not algorithm.is_eagle() or not requested.current().draft_gate:
        return worker
    return GatedWorker
