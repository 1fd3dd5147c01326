"""A model's decode steps on a CPU, called without SGLang's layer boundaries, dispatchers and linear layers in between.

At a few tokens these take as long as what they call, of a model of some hundred million parameters.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from longcat_core.kernels.cpu.decoder import DecoderLayer
from longcat_core.kernels.cpu.norm import add_rms_norm
from longcat_core.layers.latent_attention import PagedBatch
from longcat_core.plugin.kept import kept
from longcat_sglang.devices.cpu.attention import LatentAttentionBackend, compiled_mla
from longcat_sglang.devices.cpu.linear import compiled_ffn

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from longcat_sglang.model import LongcatDecoderLayer, LongcatModel


def decode(
    model: LongcatModel,
    embedded: Tensor,
    forward_batch: ForwardBatch,
    cos: Tensor,
    sin: Tensor,
    choices: list[Tensor] | None,
) -> Tensor | None:
    """As `devices.base.Device.decode`."""
    layers, backend = compiled_layers(model), get_attn_backend()
    if layers is None or not isinstance(backend, LatentAttentionBackend) or forward_batch.forward_mode.is_idle():
        return None
    if embedded.dtype != torch.bfloat16 or embedded.stride(-1) != 1:  # given by the user
        return None
    batch, slots = backend.forward_metadata, forward_batch.out_cache_loc
    caches = [[backend.cache_of(attention.attn_mqa) for attention in each.self_attn] for each in _layers(model)]
    if batch is None or backend.tokens != len(embedded) or not layers[0].takes(len(embedded), caches[0][0], batch):
        return None
    return through(model, layers, embedded, cos, sin, caches, slots, batch, choices)


def through(
    model: LongcatModel,
    layers: Sequence[DecoderLayer],
    embedded: Tensor,
    cos: Tensor,
    sin: Tensor,
    caches: Sequence[Sequence[Tensor]],
    slots: Tensor,
    batch: PagedBatch,
    choices: list[Tensor] | None,
) -> Tensor:
    """Few tokens through all layers and the last norm, [T, H]. caches: of both attentions of each layer; choices: as of
    `devices.base.Device.decode`; the rest as of `DecoderLayer`."""
    hidden_states, residual, recorder = embedded, None, get_global_expert_distribution_recorder()
    for n, (layer, module) in enumerate(zip(layers, _layers(model), strict=True)):
        hidden_states, residual, ids = layer(hidden_states, residual, cos, sin, caches[n], slots, batch)
        with recorder.with_current_layer(n):
            module.mlp.note(ids, choices)
    assert residual is not None, "a model has layers"
    return add_rms_norm(hidden_states, residual, model.norm.weight, model.norm.variance_epsilon)[0]


def compiled_layers(model: LongcatModel) -> list[DecoderLayer] | None:
    """None where core's kernels do not multiply in all of its layers, or it is on several ranks."""
    return kept(model, _compiled)


def _compiled(model: LongcatModel) -> list[DecoderLayer] | None:
    if get_parallel().tp_size > 1 or model.norm.weight.dtype != torch.bfloat16:
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
    experts = moe.experts.quant_method.experts_of(moe.experts)
    if experts is None:
        return None
    modules: Any = zip(layer.self_attn, layer.mlps, strict=True)
    parts = ((compiled_mla(attention), compiled_ffn(ffn)) for attention, ffn in modules)
    return DecoderLayer.of(layer, parts, experts)


def _layers(model: LongcatModel) -> Any:
    return model.layers
