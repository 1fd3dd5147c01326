"""Verification of drafts for requests that sample, on a CPU: a draft is accepted where it is what the target draws."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.eagle_info import EagleVerifyInput
from sglang.srt.speculative.eagle_utils import verify_tree_greedy_func
from torch import Tensor


def verify_sampled(
    draft: EagleVerifyInput, batch: ScheduleBatch, logits_output: LogitsProcessorOutput
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the target's token after every node of the drafts, and follow the path of nodes that were drawn.

    What comes out is distributed as the target's own tokens, whatever the drafts are, as each is drawn from its
    distribution independently of them. SGLang does so for its UNO (`sample_uno_tree_target_tokens`); its kernels for
    CUDA accept a draft with its probability instead, to the same effect.

    The logits [R n, vocabulary] have penalties, biases and grammars applied. Returns the tokens predicted [R n], the
    tokens gained by each request [R] and the nodes on its path [R, longest path], all int32, as `eagle_sample` does.
    """
    sampling, width, logits = batch.sampling_info, draft.draft_token_num, logits_output.next_token_logits
    assert logits is not None

    def each_node(of_request: Tensor) -> Tensor:
        return of_request.repeat_interleave(width, dim=0)

    probabilities = (logits.float() / each_node(sampling.temperatures)).softmax(dim=-1)
    drawn = top_k_top_p_min_p_sampling_from_probs_torch(
        probabilities,
        each_node(sampling.top_ks),
        each_node(sampling.top_ps),
        each_node(sampling.min_ps),
        sampling.need_min_p_sampling,
        None if sampling.sampling_seed is None else each_node(sampling.sampling_seed),
        draft.positions,
    ).long()
    parallel = get_parallel()
    if parallel.attn_tp_size > 1:  # every rank with these requests draws, and one decides
        parallel.attn_tp_group.broadcast(drawn, src=0)
    requests = len(batch.seq_lens)
    predicted, path, accepted = verify_tree_greedy_func(
        predicts=torch.zeros(requests * width, dtype=torch.int32),
        accept_index=torch.full((requests, draft.max_tree_depth), -1, dtype=torch.int32),
        accept_token_num=torch.empty(requests, dtype=torch.int32),
        candidates=draft.draft_token.view(requests, width),
        retrieve_index=draft.retrieve_index,
        retrieve_next_token=draft.retrieve_next_token,
        retrieve_next_sibling=draft.retrieve_next_sibling,
        target_predict=drawn.view(requests, width),
        topk=draft.tree_topk,
    )
    return predicted, accepted + 1, path
