"""Chains of drafts on a CPU, without vLLM's proposer, its metadata and its model runner in between.

One more draft is one pass through one small layer, which takes less time than calling it through these.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size

from longcat_core.kernels.cpu.attention import takes
from longcat_core.kernels.cpu.experts import CompiledFFN
from longcat_core.kernels.cpu.mla import Mla
from longcat_core.kernels.cpu.mtp import MtpLayer, Norms
from longcat_core.kernels.cpu.product import FEW_ROWS
from longcat_core.layers import rotary
from longcat_core.layers.latent_attention import PagedBatch
from longcat_core.plugin.kept import kept
from longcat_vllm.devices.cpu.attention import LatentAttentionImpl
from longcat_vllm.devices.cpu.linear import projection

if TYPE_CHECKING:
    from vllm.v1.spec_decode.eagle import EagleProposer

    from longcat_vllm.mtp import LongcatMTPModel

PADDING_SLOT = -1


def draft_chain(original: Callable[..., Any], proposer: EagleProposer, *args: Any, **kwargs: Any) -> Any:
    """As vLLM's `propose`, which drafts the first token of each chain; those after it are passes of `MtpLayer`."""
    drafts = kwargs.get("num_speculative_tokens", 0)
    layer = None if args or drafts < 2 else _layer_of_chains(proposer, kwargs)
    if layer is None:
        return original(proposer, *args, **kwargs)
    batch, rows = kwargs["common_attn_metadata"], kwargs["token_indices_to_sample"]
    rows = batch.query_start_loc[1:] - 1 if rows is None else rows
    causal: Any = proposer.model
    causal.drafted_from = None
    tokens = [original(proposer, **kwargs | {"num_speculative_tokens": 1})]
    proposer.num_speculative_tokens = drafts
    model, hidden_states, attention = causal.model, causal.drafted_from, causal.model.layers[0].self_attn.attn
    assert hidden_states is not None, "the first drafts were chosen from logits"
    cache = attention.kv_cache.view(-1, attention.kv_cache.shape[-1])
    steps = torch.arange(1, drafts).unsqueeze(1)
    positions, slots = _places(proposer.positions[rows.long()] + steps, batch.block_table_tensor, proposer)
    cos, sin = rotary.cos_sin(positions.unsqueeze(-1), model.inverse_frequencies, model.attention_factor)
    starts = range(len(tokens[0]) + 1)
    for step, lengths in enumerate((positions + 1).tolist()):
        embedded = F.embedding(tokens[-1].flatten(), model.embed_tokens.weight)
        where = PagedBatch.build(starts, lengths, batch.block_table_tensor, proposer.block_size)
        hidden_states = layer(embedded, hidden_states, cos[step], sin[step], cache, slots[step], where)
        assert hidden_states is not None, "one token of few requests"
        tokens.append(causal.compute_logits(hidden_states).argmax(dim=-1, keepdim=True))
    return torch.cat(tokens, dim=1)


def _places(positions: Tensor, block_table: Tensor, proposer: EagleProposer) -> tuple[Tensor, Tensor]:
    """positions: integer [steps, R]. They, and their slots in the cache. A draft beyond the longest context is at the
    first position and has no slot, as vLLM has it; it is never verified."""
    is_beyond = positions >= proposer.max_model_len
    positions = torch.where(is_beyond, 0, positions)
    blocks = block_table.gather(1, (positions // proposer.block_size).T.long()).T.long()
    slots = blocks * proposer.block_size + positions % proposer.block_size
    return positions, torch.where(is_beyond, PADDING_SLOT, slots)


def _layer_of_chains(proposer: EagleProposer, arguments: dict[str, Any]) -> MtpLayer | None:
    sampling, batch = arguments.get("sampling_metadata"), arguments.get("common_attn_metadata")
    if sampling is None or batch is None or "token_indices_to_sample" not in arguments:
        return None
    is_greedy = not proposer._enable_probabilistic_draft_probs or sampling.all_greedy
    if not is_greedy or proposer.use_local_argmax_reduction or batch.batch_size() > FEW_ROWS:
        return None
    if proposer.vllm_config.parallel_config.data_parallel_size > 1:  # ranks count each other's passes of the drafter
        return None
    causal: Any = proposer.model
    if not hasattr(causal, "drafted_from") or proposer.parallel_drafting:  # the first is of our MTP layer alone
        return None
    model = causal.model
    return kept(model, _compiled, "mtp_layer")


def _compiled(model: LongcatMTPModel) -> MtpLayer | None:
    """None where core's kernels do not multiply in all of its layers, or it is on several ranks."""
    layer: Any = model.layers[0]
    attention, ffn, implementation = layer.self_attn, layer.transformer_layer["mlp"], layer.self_attn.attn.impl
    linear = attention.fused_qkv_a_proj, attention.q_b_proj, attention.o_proj, layer.eh_proj
    qkv_a, q_b, o, eh_proj, gate_up, down = map(projection, (*linear, ffn.gate_up_proj, ffn.down_proj))
    if qkv_a is None or q_b is None or o is None or eh_proj is None or gate_up is None or down is None:
        return None
    if get_tensor_model_parallel_world_size() > 1 or not isinstance(implementation, LatentAttentionImpl):
        return None
    if not takes(implementation.up):
        return None
    config = model.config
    latent_norms = attention.q_a_layernorm.weight, attention.kv_a_layernorm.weight
    mla = Mla(qkv_a, *latent_norms, q_b, implementation.up, o, config.mla_norm_eps, implementation.scale)
    norms = Norms.of(layer, model.norm)
    compiled = CompiledFFN.of(gate_up, down)
    return None if compiled is None else MtpLayer(norms, config.rms_norm_eps, eh_proj, mla, compiled)
