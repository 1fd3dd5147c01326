"""Drafts on a CPU, without vLLM's proposer, its metadata, its model runner and the draft model's modules in between.

One more draft is one pass through one small layer, which takes less time than calling it through these.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.distributed.kv_transfer import has_kv_transfer_group

from longcat_core.kernels.cpu.mtp import Drafts, MtpLayer, Norms, Vocabulary
from longcat_core.kernels.cpu.product import FEW_ROWS, product
from longcat_core.layers import rotary
from longcat_core.layers.latent_attention import PagedBatch
from longcat_core.plugin.kept import kept
from longcat_vllm.devices.cpu.attention import cache_of, compiled_mla
from longcat_vllm.devices.cpu.linear import compiled_ffn, projection

if TYPE_CHECKING:
    from vllm.v1.spec_decode.eagle import EagleProposer

    from longcat_vllm.mtp import LongcatMTPModel

PADDING_SLOT = -1


def draft_chain(original: Callable[..., Any], proposer: EagleProposer, *args: Any, **kwargs: Any) -> Any:
    """As vLLM's `propose`, in passes of `MtpLayer`; with many tokens to read, vLLM drafts the first of each chain."""
    drafts = kwargs.get("num_speculative_tokens", 0)
    layer = None if args or drafts == 0 else _layer_of_chains(proposer, kwargs)
    if layer is None:
        return original(proposer, *args, **kwargs)
    batch, rows = kwargs["common_attn_metadata"], kwargs["token_indices_to_sample"]
    rows = (batch.query_start_loc[1:] - 1 if rows is None else rows).long()
    causal: Any = proposer.model
    model, cache = causal.model, cache_of(causal.model.layers[0].self_attn.attn)
    vocabulary = _vocabulary(causal)
    if cache.dtype != torch.bfloat16 or (vocabulary is None and drafts > 1):
        return original(proposer, *args, **kwargs)
    proposer._last_draft_probs = None  # of requests that sampled, in a step before
    read = _read(layer, proposer, cache, rows, kwargs)
    hidden_states: Tensor | None
    if read is not None:
        tokens, hidden_states = read
    elif drafts == 1:
        return original(proposer, *args, **kwargs)
    else:
        causal.drafted_from = None
        tokens = original(proposer, **kwargs | {"num_speculative_tokens": 1})
        hidden_states = causal.drafted_from
    proposer.num_speculative_tokens = drafts
    assert hidden_states is not None, "the first drafts were chosen from logits"
    if drafts == 1 or vocabulary is None:
        return tokens
    steps = torch.arange(1, drafts).unsqueeze(1)
    positions, slots = _places(kwargs["target_positions"][rows] + steps, batch.block_table_tensor, proposer)
    cos, sin = rotary.cos_sin(positions.unsqueeze(-1), model.inverse_frequencies, model.attention_factor)
    lengths = (positions.amax(dim=0) + 1).tolist()
    whole = PagedBatch(range(len(lengths) + 1), lengths, batch.block_table_tensor, proposer.block_size)
    made = layer.chain(vocabulary, tokens.flatten(), hidden_states, cos, sin, cache, slots, whole, positions)
    assert made is not None, "one token of few requests"
    if causal.gated_drafts is not None:
        for given in made.hidden_states:
            causal.gated_drafts.observe(product(given, vocabulary.head))
    return made.tokens


def _vocabulary(causal: Any) -> Vocabulary | None:
    """None where logits are more than a product with a weight in bf16, or somebody watches how they are made."""
    processor, head = causal.logits_processor, causal.lm_head
    if any(module._forward_hooks or module._forward_pre_hooks for module in (causal, processor, head)):
        return None
    if processor.head_dtype not in (None, torch.bfloat16) or head.weight.dtype != torch.bfloat16:
        return None
    return Vocabulary(causal.model.embed_tokens.weight, head.weight[: processor.org_vocab_size])


def _read(
    layer: MtpLayer, proposer: EagleProposer, cache: Tensor, rows: Tensor, arguments: dict[str, Any]
) -> Drafts | None:
    """The pass over what the target has read, and first drafts, [R, 1]; None where there is more than a few tokens.

    rows: of each request's last token, int64 [R].
    """
    batch, positions = arguments["common_attn_metadata"], arguments["target_positions"]
    if len(positions) > FEW_ROWS:
        return None
    causal: Any = proposer.model
    model: Any = causal.model
    ids = arguments["target_token_ids"].roll(-1)  # a token is drafted from with the one that comes after it
    ids[rows] = arguments["next_token_ids"].to(ids.dtype)
    cos, sin = rotary.cos_sin(positions.unsqueeze(-1), model.inverse_frequencies, model.attention_factor)
    where = PagedBatch(
        batch.query_start_loc_cpu.tolist(), batch.seq_lens.tolist(), batch.block_table_tensor, proposer.block_size
    )
    given, slots = arguments["target_hidden_states"], batch.slot_mapping[: len(positions)]
    vocabulary = None if causal.gated_drafts is not None else _vocabulary(causal)  # a gate sees the logits
    if vocabulary is not None:
        lengths = positions[rows] + 1
        made = layer.draft(vocabulary, ids, given, cos, sin, cache, slots, where, rows, lengths)
        return None if made is None else Drafts(made.tokens.unsqueeze(1), made.hidden_states)
    read = layer(F.embedding(ids, model.embed_tokens.weight), given, cos, sin, cache, slots, where)
    if read is None:
        return None
    hidden_states = read[rows]
    return Drafts(causal.compute_logits(hidden_states).argmax(dim=-1, keepdim=True), hidden_states)


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
    if has_kv_transfer_group():  # to which each attention of vLLM's hands its cache
        return None
    return kept(causal.model, _compiled, "kernels")


def _compiled(model: LongcatMTPModel) -> MtpLayer | None:
    """None where core's kernels do not multiply in all of its layers, or it is on several ranks."""
    layer: Any = model.layers[0]
    mla, ffn = compiled_mla(layer.self_attn), compiled_ffn(layer.transformer_layer["mlp"])
    eh_proj = projection(layer.eh_proj)
    if mla is None or ffn is None or eh_proj is None:
        return None
    return MtpLayer(Norms.of(layer, model.norm), model.config.rms_norm_eps, eh_proj, mla, ffn)
