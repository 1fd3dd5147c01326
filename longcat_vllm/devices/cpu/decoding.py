"""A model's decode steps on a CPU, called without vLLM's linear layers, MoE runner and attention layer in between.

At a few tokens these take as long as what they call, of a model of some hundred million parameters.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from vllm.distributed import get_pp_group
from vllm.distributed.kv_transfer import has_kv_transfer_group
from vllm.forward_context import get_forward_context
from vllm.lora.layers import BaseLayerWithLoRA

from longcat_core.kernels.cpu.decoder import DecoderLayer
from longcat_core.kernels.cpu.norm import add_rms_norm
from longcat_core.layers import rotary
from longcat_core.layers.latent_attention import PagedBatch
from longcat_core.plugin.kept import kept
from longcat_vllm.devices.cpu.attention import LatentAttentionMetadata, cache_of, compiled_mla
from longcat_vllm.devices.cpu.experts import experts_of
from longcat_vllm.devices.cpu.linear import compiled_ffn

if TYPE_CHECKING:
    from longcat_vllm.model import LongcatDecoderLayer, LongcatModel


class Step(NamedTuple):
    batch: PagedBatch
    slots: Tensor
    """int64 [T]"""


def step_of(attention: Any, tokens: int) -> Step | None:
    """What an MLAAttention is told of this step; None where not all tokens are of one batch, or its cache goes to
    other servers layer by layer."""
    context, name = get_forward_context(), attention.layer_name
    if not isinstance(context.attn_metadata, dict) or not isinstance(context.slot_mapping, dict):
        return None
    metadata, slots = context.attn_metadata.get(name), context.slot_mapping.get(name)
    if slots is None or not isinstance(metadata, LatentAttentionMetadata) or has_kv_transfer_group():
        return None
    if metadata.num_actual_tokens != tokens or len(slots) < tokens:
        return None
    return Step(metadata.batch, slots[:tokens])


def decode(
    model: LongcatModel, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
) -> tuple[Tensor, list[Tensor] | None] | None:
    """As `devices.base.Device.decode`."""
    if not isinstance(get_forward_context().attn_metadata, dict):  # as in a profiling run
        return None
    layers = compiled_layers(model)
    if layers is None:
        return None
    attentions = [[attention.attn for attention in layer.self_attn] for layer in _layers(model)]
    step = step_of(attentions[0][0], len(positions))
    if step is None or not layers[0].takes(len(positions), cache_of(attentions[0][0]), step.batch):
        return None
    if inputs_embeds is None:
        assert input_ids is not None
        embedded = model.embed_input_ids(input_ids)
    else:
        embedded = inputs_embeds
    if embedded.dtype != torch.bfloat16 or embedded.stride(-1) != 1:  # given by the user
        return None
    cos, sin = rotary.cos_sin(positions.unsqueeze(-1), model.inverse_frequencies, model.attention_factor)
    hidden_states, residual, choices = embedded, None, []
    for layer, pair in zip(layers, attentions, strict=True):
        caches = [cache_of(attention) for attention in pair]
        hidden_states, residual, ids = layer(hidden_states, residual, cos, sin, caches, step.slots, step.batch)
        choices.append(ids)
    assert residual is not None, "a model has layers"
    norm: Any = model.norm
    normed, _ = add_rms_norm(hidden_states, residual, norm.weight, norm.variance_epsilon)
    return normed, choices if model.notes_choices else None


def compiled_layers(model: LongcatModel) -> list[DecoderLayer] | None:
    """None where core's kernels do not multiply in all of its layers, or it is on several ranks."""
    return kept(model, _compiled, "kernels")


def _compiled(model: LongcatModel) -> list[DecoderLayer] | None:
    norm: Any = model.norm
    if get_pp_group().world_size > 1 or norm.weight.dtype != torch.bfloat16:
        return None
    if any(isinstance(module, BaseLayerWithLoRA) for module in model.modules()):
        return None
    layers = []
    for module in _layers(model):
        layer = _compiled_layer(module)
        if layer is None:
            return None
        layers.append(layer)
    return layers


def _compiled_layer(layer: LongcatDecoderLayer) -> DecoderLayer | None:
    moe: Any = layer.mlp
    experts = experts_of(moe.experts)
    if experts is None or moe.placed is not None:
        return None
    modules: Any = zip(layer.self_attn, layer.mlps, strict=True)
    parts = ((compiled_mla(attention), compiled_ffn(ffn)) for attention, ffn in modules)
    return DecoderLayer.of(layer, parts, experts)


def _layers(model: LongcatModel) -> Any:
    return model.layers
