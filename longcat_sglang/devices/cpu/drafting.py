"""The MTP layer's decode steps on a CPU, called without SGLang's layers in between, and chains of drafts made of them.

One more draft is one pass through one small layer. SGLang's way through its model runner, its layers and its logits
takes longer than what these compute.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_parallel, get_spec
from sglang.srt.speculative.eagle_utils import per_step_draft_out_cache_loc
from torch import Tensor

from longcat_core.kernels.cpu.mtp import MtpLayer, Norms, Vocabulary
from longcat_core.kernels.cpu.product import FEW_ROWS, choose
from longcat_core.layers import rotary
from longcat_core.plugin.kept import kept
from longcat_sglang.devices.cpu.attention import DraftingBackend, LatentAttentionBackend, compiled_mla
from longcat_sglang.devices.cpu.linear import compiled_ffn, projection

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.utils import GenerationBatchResult
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

    from longcat_sglang.mtp import LongcatMTPModel


def draft(
    model: LongcatMTPModel, embedded: Tensor, forward_batch: ForwardBatch, cos: Tensor, sin: Tensor
) -> Tensor | None:
    """As `devices.base.Device.draft`."""
    layer, backend = compiled_layer(model), get_attn_backend()
    if layer is None or not isinstance(backend, LatentAttentionBackend) or backend.forward_metadata is None:
        return None
    given: Any = forward_batch.spec_info
    cache, batch = backend.cache_of(_attention(model)), backend.forward_metadata
    return layer(embedded, given.hidden_states, cos, sin, cache, forward_batch.out_cache_loc, batch)


def compiled_layer(model: LongcatMTPModel) -> MtpLayer | None:
    """None where core's kernels do not multiply in all of its layers, or it is on several ranks."""
    return kept(model, _compiled)


def _compiled(model: LongcatMTPModel) -> MtpLayer | None:
    layer: Any = model.layers[0]
    mla, ffn = compiled_mla(layer.self_attn), compiled_ffn(layer.transformer_layer["mlp"])
    eh_proj = projection(layer.eh_proj)
    if mla is None or ffn is None or eh_proj is None or get_parallel().tp_size > 1:
        return None
    return MtpLayer(Norms.of(layer, model.norm), model.config.rms_norm_eps, eh_proj, mla, ffn)


def _attention(model: LongcatMTPModel) -> Any:
    layer: Any = model.layers[0]
    return layer.self_attn.attn_mqa


def draft_chain(
    original: Callable[..., Any], worker: EagleDraftWorker, forward_batch: ForwardBatch, *args: Any, **kwargs: Any
) -> Any:
    """The drafts of a chain after the first, one pass of `MtpLayer` after the other; what SGLang's own returns."""
    is_ours = isinstance(worker.draft_attn_backend, DraftingBackend) and not forward_batch.forward_mode.is_idle()
    layer = layer_of_chains(worker, forward_batch.batch_size, 1) if is_ours else None
    if layer is None:
        return original(worker, forward_batch, *args, **kwargs)
    drafter: Any = worker
    causal: Any = drafter.draft_runner.model
    model, backends = causal.model, drafter.draft_attn_backend.attn_backends
    given: Any = forward_batch.spec_info
    tokens, hidden_states = [given.topk_index], given.hidden_states
    requests, steps = len(tokens[0]), len(backends)
    slots = per_step_draft_out_cache_loc(forward_batch.out_cache_loc, requests, 1, steps + 1)
    positions = forward_batch.positions + torch.arange(steps).unsqueeze(1)
    cos, sin = rotary.cos_sin(positions.unsqueeze(-1), model.inverse_frequencies, model.attention_factor)
    head = head_of(causal)
    for step, backend in enumerate(backends):
        embedded = F.embedding(tokens[-1].flatten(), model.embed_tokens.weight)
        cache, batch = backend.cache_of(_attention(model)), backend.forward_metadata
        made = layer(embedded, hidden_states, cos[step], sin[step], cache, slots[step], batch)
        assert made is not None, "decode steps of few requests"
        hidden_states = made
        tokens.append(choose(made, head).unsqueeze(1))
    forward_batch.positions.add_(steps)
    parents, scores = drafter._topk1_parents_prealloc[:requests], drafter._topk1_score_indices_prealloc[:requests]
    return parents, scores, torch.cat(tokens, dim=1), None


def draft_after_verification(
    original: Callable[..., Any], worker: EagleDraftWorker, batch: ScheduleBatch, result: GenerationBatchResult
) -> None:
    """The first drafts of the next chains, from the hidden states of a verification; as SGLang's own, which leaves its
    changes of the batch to be undone by the scheduler."""
    width = worker.speculative_num_draft_tokens
    requests = len(batch.seq_lens)
    layer = layer_of_chains(worker, requests, width) if not batch.forward_mode.is_idle() else None
    given, verified, accepted = result.next_draft_input, result.logits_output, result.accept_lens
    if layer is None or given is None or verified is None or accepted is None:
        original(worker, batch, result)
        return
    drafter: Any = worker
    causal: Any = drafter.draft_runner.model
    model, backend = causal.model, drafter.draft_runner.attn_backend
    target = drafter.target_worker.model_runner.attn_backend  # which was asked last in the verification
    if not isinstance(target, LatentAttentionBackend) or target.tokens != requests * width:
        original(worker, batch, result)
        return
    where = target.forward_metadata
    assert where is not None, "there are tokens"
    positions = (batch.seq_lens.unsqueeze(1) + torch.arange(width)).flatten()
    cos, sin = rotary.cos_sin(positions.unsqueeze(-1), model.inverse_frequencies, model.attention_factor)
    cache, slots = backend.cache_of(_attention(model)), batch.out_cache_loc
    vocabulary, last = vocabulary_of(causal), torch.arange(0, requests * width, width) + accepted - 1
    tokens, hidden_states, lengths = result.next_token_ids, verified.hidden_states, batch.seq_lens + accepted
    made = layer.draft(vocabulary, tokens, hidden_states, cos, sin, cache, slots, where, last, lengths)
    if made is None:  # so many drafts that torch attends to them as to a prompt
        original(worker, batch, result)
        return
    given.topk_index = made.tokens.unsqueeze(1)
    given.topk_p = torch.ones_like(given.topk_index, dtype=torch.float32)
    given.hidden_states, given.cuda_graph_compatible = made.hidden_states, True


def layer_of_chains(worker: EagleDraftWorker, requests: int, width: int) -> MtpLayer | None:
    """width: tokens of a request in a pass."""
    runner, parents = worker.draft_runner, worker._topk1_parents_prealloc
    is_plain = worker.topk == 1 and worker.hot_token_id is None and not get_spec().speculative_use_rejection_sampling
    is_watched = getattr(worker, "is_gated", False) or runner.canary_manager is not None
    if not is_plain or is_watched or not isinstance(runner.attn_backend, LatentAttentionBackend):
        return None
    causal: Any = runner.model
    head = getattr(causal.lm_head, "weight", None)
    if head is None or head.dtype != torch.bfloat16 or causal.logits_processor.use_fp32_lm_head:
        return None
    if parents is None or requests > len(parents):
        return None
    if requests * width > FEW_ROWS:
        return None
    return compiled_layer(causal.model)


def head_of(causal: Any) -> Tensor:
    """A model's weight of logits, bf16 [vocabulary, H]."""
    weight: Tensor = causal.lm_head.weight[: causal.model.config.vocab_size]
    return weight


def vocabulary_of(causal: Any) -> Vocabulary:
    """A drafter's, with weights in bf16."""
    return Vocabulary(causal.model.embed_tokens.weight, head_of(causal))
