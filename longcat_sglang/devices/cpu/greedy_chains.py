"""A decode step with drafts on a CPU, of requests that are all greedy: drafting, verification and drafting in one pass.

SGLang's own step builds a batch for each of the three, and a tree where there is a chain. For a model whose forward
pass takes some milliseconds that is as much again.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from sglang.srt.environ import envs
from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.eagle_info import EagleDraftInput
from sglang.srt.speculative.spec_utils import SIMULATE_ACC_LEN
from torch import Tensor

from longcat_core.kernels.cpu.decoder import DecoderLayer
from longcat_core.kernels.cpu.mtp import MtpLayer
from longcat_core.kernels.cpu.product import choose
from longcat_core.layers import rotary
from longcat_core.layers.latent_attention import PagedBatch
from longcat_sglang.devices.cpu.attention import LatentAttentionBackend
from longcat_sglang.devices.cpu.decoding import compiled_layers, through
from longcat_sglang.devices.cpu.drafting import head_of, layer_of_chains, vocabulary_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2


class Models(NamedTuple):
    target: Any
    """Ours, with its head."""
    layers: list[DecoderLayer]
    backend: LatentAttentionBackend
    drafter: Any
    mtp: MtpLayer
    drafting_backend: LatentAttentionBackend


class Places(NamedTuple):
    """Of the new tokens of R requests, `width` of each."""

    positions: Tensor
    """int64 [R, width]"""
    slots: Tensor
    """int64 [R, width]"""
    cos: Tensor
    """fp32 [R, width, rope / 2], as the next one."""
    sin: Tensor
    table: Tensor
    rows: list[int]
    lengths: list[int]
    """Of the contexts before them."""

    def batch(self) -> PagedBatch:
        width = self.positions.shape[1]
        ends = [length + width for length in self.lengths]
        starts = range(0, (len(ends) + 1) * width, width)
        return PagedBatch(starts, ends, self.table, block_size=1, table_rows=self.rows)


def speculate(
    original: Callable[..., Any], worker: EAGLEWorkerV2, batch: ScheduleBatch, on_publish: Any = None, **kwargs: Any
) -> Any:
    """As SGLang's `forward_batch_generation`."""
    models = _models(worker, batch)
    if models is None:
        return original(worker, batch, on_publish, **kwargs)
    width, given = worker.speculative_num_draft_tokens, batch.spec_info
    assert isinstance(given, EagleDraftInput)
    places = _places(worker, batch, models, width)
    read = places.batch()
    cache = models.backend.cache_of(models.target.model.layers[0].self_attn[0].attn_mqa)
    if not models.layers[0].takes(places.slots.numel(), cache, read):
        return original(worker, batch, on_publish, **kwargs)
    drafts = _drafted(models, given, places, read)
    tokens = torch.cat((given.bonus_tokens.unsqueeze(1).long(), drafts), dim=1)
    hidden_states = _verified(models, tokens, places, read)
    predicted = choose(hidden_states, head_of(models.target)).view(tokens.shape)
    accepted = (predicted[:, :-1] == drafts).int().cumprod(dim=1).sum(dim=1).int() + 1
    if on_publish is not None:
        on_publish(batch.seq_lens + accepted)
    return _result(models, batch, places, read, hidden_states, predicted, accepted)


def _drafted(models: Models, given: EagleDraftInput, places: Places, read: PagedBatch) -> Tensor:
    """int64 [R, width - 1]: the first one that was drafted before, and those after it."""
    passes = places.positions.shape[1] - 2
    if passes == 0:
        return given.topk_index
    assert given.hidden_states is not None, "it was looked at"
    positions, slots, cos, sin = (each[:, :passes].transpose(0, 1) for each in places[:4])
    vocabulary = vocabulary_of(models.drafter)
    first = given.topk_index.squeeze(1)
    made = models.mtp.chain(vocabulary, first, given.hidden_states, cos, sin, _cache(models), slots, read, positions)
    assert made is not None, "decode steps of few requests"
    return made.tokens


def _verified(models: Models, tokens: Tensor, places: Places, read: PagedBatch) -> Tensor:
    """The target's hidden states [R width, H] of tokens, int64 [R, width]."""
    model, slots = models.target.model, places.slots.flatten()
    choices = model.begin_step()
    caches = [[models.backend.cache_of(attention.attn_mqa) for attention in layer.self_attn] for layer in model.layers]
    embedded = F.embedding(tokens.flatten(), model.embed_tokens.weight)
    angles = places.cos.flatten(0, 1), places.sin.flatten(0, 1)
    hidden_states = through(model, models.layers, embedded, *angles, caches, slots, read, choices)
    if choices is not None:
        model.end_step(choices, slots)
    return hidden_states


def _result(
    models: Models,
    batch: ScheduleBatch,
    places: Places,
    read: PagedBatch,
    hidden_states: Tensor,
    predicted: Tensor,
    accepted: Tensor,
) -> GenerationBatchResult:
    """With the first drafts of the next step. predicted: int64 [R, width]; accepted: int32 [R], tokens gained."""
    requests, width = predicted.shape
    firsts = torch.arange(0, requests * width, width)
    last = firsts + accepted - 1
    flat = predicted.flatten()
    made = models.mtp.draft(
        vocabulary_of(models.drafter),
        flat,
        hidden_states,
        places.cos.flatten(0, 1),
        places.sin.flatten(0, 1),
        _cache(models),
        places.slots.flatten(),
        read,
        wanted=last,
        lengths=batch.seq_lens + accepted,
    )
    assert made is not None, "as the target took them"
    first_drafts, flat = made.tokens.unsqueeze(1), flat.int()
    nodes = torch.arange(width)
    return GenerationBatchResult(
        logits_output=LogitsProcessorOutput(next_token_logits=None, hidden_states=hidden_states),
        next_token_ids=flat,
        speculative_num_draft_tokens=width,
        next_draft_input=EagleDraftInput(
            topk_p=torch.ones_like(first_drafts, dtype=torch.float32),
            topk_index=first_drafts,
            hidden_states=made.hidden_states,
            bonus_tokens=flat[last],
        ),
        accept_lens=accepted,
        accept_index=torch.where(nodes < accepted.unsqueeze(1), firsts.unsqueeze(1) + nodes, -1).int(),
        new_seq_lens=batch.seq_lens + accepted,
    )


def _places(worker: EAGLEWorkerV2, batch: ScheduleBatch, models: Models, width: int) -> Places:
    model, table = models.target.model, worker.req_to_token_pool.req_to_token
    positions = batch.seq_lens.long().unsqueeze(1) + torch.arange(width)
    cos, sin = rotary.cos_sin(positions, model.inverse_frequencies, model.attention_factor)
    rows = batch.req_pool_indices
    slots = table[rows.long().unsqueeze(1), positions].long()
    return Places(positions, slots, cos, sin, table, rows.tolist(), batch.seq_lens.tolist())


def _models(worker: EAGLEWorkerV2, batch: ScheduleBatch) -> Models | None:
    """None where something is asked for that SGLang's own way does beside tokens."""
    is_decode = batch.forward_mode.is_decode() and not batch.is_extend_in_batch and batch.spec_info is not None
    if not is_decode or not isinstance(batch.spec_info, EagleDraftInput) or get_parallel().pp_size > 1:
        return None
    if batch.return_logprob or batch.return_hidden_states or batch.has_grammar or not _is_greedy(batch.sampling_info):
        return None
    if get_global_expert_distribution_recorder().recording or SIMULATE_ACC_LEN > 0 or _looks_at_logits():
        return None
    width, steps = worker.speculative_num_draft_tokens, worker.speculative_num_steps
    if steps < 1 or width != steps + 1 or worker.adaptive_controller is not None:
        return None
    anything: Any = worker
    drafting, runner = anything.draft_worker, anything.target_worker.model_runner
    mtp = layer_of_chains(drafting, len(batch.seq_lens), width)
    if mtp is None or not isinstance(runner.attn_backend, LatentAttentionBackend) or runner.canary_manager is not None:
        return None
    target, layers = runner.model, compiled_layers(runner.model.model)
    if layers is None or target.lm_head.weight.dtype != torch.bfloat16 or target.logits_processor.use_fp32_lm_head:
        return None
    drafter, given = drafting.draft_runner, batch.spec_info.hidden_states
    if given is None or given.dtype != torch.bfloat16 or _are_watched(target, drafter.model):
        return None
    return Models(target, layers, runner.attn_backend, drafter.model, mtp, drafter.attn_backend)


def _is_greedy(sampling: Any) -> bool:
    """Whether the best of the logits as they are is what a request is to get."""
    penalties = sampling.penalizer_orchestrator
    return (
        sampling.is_all_greedy
        and not sampling.has_custom_logit_processor
        and sampling.logit_bias is None
        and sampling.acc_additive_penalties is None
        and sampling.acc_scaling_penalties is None
        and (penalties is None or not penalties.is_required)
        and sampling.sampling_mask_batch_indices is None
    )


def _looks_at_logits() -> bool:
    return envs.SGLANG_SANITIZE_NAN_LOGITS.get() or envs.SGLANG_ENABLE_ASYNC_ASSERT.get()


def _are_watched(*causal: Any) -> bool:
    """Whether somebody has hooks on a model, or on what makes its logits; `kept` looks at what is between."""
    modules = [module for each in causal for module in (each, each.logits_processor)]
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _cache(models: Models) -> Tensor:
    attention = models.drafter.model.layers[0].self_attn.attn_mqa
    return models.drafting_backend.cache_of(attention)
