"""The MTP layer's decode steps on a CPU, called without SGLang's layers in between, and chains of drafts made of them.

One more draft is one pass through one small layer. SGLang's way through its model runner, its layers and its logits
takes ten times as long as what these compute.
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

from longcat_core.kernels.cpu.mla import Mla
from longcat_core.kernels.cpu.norm import add_rms_norm, rms_norm
from longcat_core.kernels.cpu.product import FEW_ROWS, product
from longcat_core.layers import rotary
from longcat_core.layers.latent_attention import PagedBatch
from longcat_sglang.devices.cpu.attention import DraftingBackend, LatentAttentionBackend, compiled_mla
from longcat_sglang.devices.cpu.linear import compiled_ffn, projection

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

    from longcat_sglang.mtp import LongcatMTPModel


class CompiledDrafter:
    """The MTP layer in core's kernels, of one rank that has all of it."""

    def __init__(self, model: LongcatMTPModel, mla: Mla, ffn: Callable[[Tensor], Tensor | None]) -> None:
        layer: Any = model.layers[0]
        self._mla, self._ffn, self._eh_proj = mla, ffn, projection(layer.eh_proj)
        self._norms = [layer.enorm["m"], layer.hnorm["m"], layer.input_layernorm]
        self._norms += [layer.post_attention_layernorm, model.norm]
        self._attention = layer.self_attn.attn_mqa

    @classmethod
    def of(cls, model: LongcatMTPModel) -> CompiledDrafter | None:
        """None where core's kernels do not multiply in all of its layers, or it is on several ranks."""
        layer: Any = model.layers[0]
        mla, ffn = compiled_mla(layer.self_attn), compiled_ffn(layer.transformer_layer["mlp"])
        norms = [module.weight.dtype for module in layer.modules() if type(module).__name__ == "RMSNorm"]
        is_bf16 = all(dtype == torch.bfloat16 for dtype in [*norms, model.norm.weight.dtype])
        if not mla or not ffn or projection(layer.eh_proj) is None or not is_bf16 or get_parallel().tp_size > 1:
            return None
        return cls(model, mla, ffn)

    def __call__(
        self,
        embedded: Tensor,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        backend: LatentAttentionBackend,
        batch: PagedBatch,
    ) -> Tensor | None:
        """embedded and hidden_states: bf16 [T, H]; cos and sin: fp32 [T, 1, rope / 2]; slots: int64 [T], where in the
        cache the tokens go. Returns bf16 [T, H], normed; None where `Mla` returns it."""
        if not 0 < len(embedded) <= FEW_ROWS:
            return None
        e, h, attention, ffn, last = ((norm.weight, norm.variance_epsilon) for norm in self._norms)
        assert self._eh_proj is not None
        joined = torch.cat((rms_norm(embedded, *e), rms_norm(hidden_states, *h)), dim=-1)
        residual = product(joined, *self._eh_proj)
        attended = self._mla(
            rms_norm(residual, *attention), cos, sin, backend.cache_of(self._attention), slots, batch
        )
        if attended is None:
            return None
        inputs, residual = add_rms_norm(attended, residual, *ffn)
        outputs = self._ffn(inputs)
        assert outputs is not None, "as few rows as attention took"
        return add_rms_norm(outputs, residual, *last)[0]


def draft(model: LongcatMTPModel, embedded: Tensor, forward_batch: ForwardBatch, cos: Tensor, sin: Tensor) -> Tensor | None:
    """As `devices.base.Device.draft`."""
    drafter, backend = compiled_drafter(model), get_attn_backend()
    if drafter is None or not isinstance(backend, LatentAttentionBackend) or backend.forward_metadata is None:
        return None
    hidden: Any = forward_batch.spec_info
    batch = backend.forward_metadata
    return drafter(embedded, hidden.hidden_states, cos, sin, forward_batch.out_cache_loc, backend, batch)


def compiled_drafter(model: LongcatMTPModel) -> CompiledDrafter | None:
    if model.compiled is None:
        model.compiled = CompiledDrafter.of(model) or False
    return model.compiled or None


def draft_chain(
    original: Callable[..., Any], worker: EagleDraftWorker, forward_batch: ForwardBatch, *args: Any, **kwargs: Any
) -> Any:
    """The drafts of a chain after the first, one pass of `CompiledDrafter` after the other; what SGLang's own returns."""
    drafter = _drafter_of_chains(worker, forward_batch)
    if drafter is None:
        return original(worker, forward_batch, *args, **kwargs)
    causal: Any = worker.draft_runner.model
    model, backends = causal.model, worker.draft_attn_backend.attn_backends
    given: Any = forward_batch.spec_info
    tokens, hidden_states = [given.topk_index], given.hidden_states
    requests, steps = len(tokens[0]), len(backends)
    slots = per_step_draft_out_cache_loc(forward_batch.out_cache_loc, requests, 1, steps + 1)
    positions = forward_batch.positions + torch.arange(steps).unsqueeze(1)
    cos, sin = rotary.cos_sin(positions.unsqueeze(-1), model.inverse_frequencies, model.attention_factor)
    head = causal.lm_head.weight[: model.config.vocab_size]
    for step, backend in enumerate(backends):
        embedded = F.embedding(tokens[-1].flatten(), model.embed_tokens.weight)
        made = drafter(
            embedded, hidden_states, cos[step], sin[step], slots[step], backend, backend.forward_metadata
        )
        assert made is not None, "decode steps of few requests"
        hidden_states = made
        tokens.append(product(made, head).argmax(dim=-1, keepdim=True))
    forward_batch.positions.add_(steps)
    parents, scores = worker._topk1_parents_prealloc[:requests], worker._topk1_score_indices_prealloc[:requests]
    return parents, scores, torch.cat(tokens, dim=1), None


def _drafter_of_chains(worker: EagleDraftWorker, forward_batch: ForwardBatch) -> CompiledDrafter | None:
    runner, backends = worker.draft_runner, worker.draft_attn_backend
    is_plain = worker.topk == 1 and worker.hot_token_id is None and not get_spec().speculative_use_rejection_sampling
    is_watched = "forward" in vars(runner) or runner.canary_manager is not None  # by a gate, which judges its logits
    if not is_plain or is_watched or forward_batch.forward_mode.is_idle() or not isinstance(backends, DraftingBackend):
        return None
    causal: Any = runner.model
    head = getattr(causal.lm_head, "weight", None)
    requests = forward_batch.batch_size
    if head is None or head.dtype != torch.bfloat16 or requests > min(FEW_ROWS, len(worker._topk1_parents_prealloc)):
        return None
    return compiled_drafter(causal.model)
