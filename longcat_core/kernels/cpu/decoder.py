"""A decoder layer for few tokens, in this folder's kernels. Reference: an engine's own modules, to the bit."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from longcat_core.kernels.cpu.experts import CompiledFFN
from longcat_core.kernels.cpu.library import require_bf16
from longcat_core.kernels.cpu.mla import Mla
from longcat_core.kernels.cpu.norm import add_rms_norm, rms_norm
from longcat_core.layers.experts import identity_share
from longcat_core.layers.latent_attention import PagedBatch
from longcat_core.layers.routing import Routing

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


class Half(NamedTuple):
    """An attention and a dense FFN, with the norms before them."""

    input_norm: Tensor
    """bf16 [H], as the next one."""
    attention: Mla
    ffn_norm: Tensor
    ffn: CompiledFFN


class Router(NamedTuple):
    route: Callable[..., Routing]
    """`layers.routing.route`, or what equals it."""
    logits: Callable[[Tensor], Tensor]
    """bf16 [T, H] -> fp32 [T, FFN experts + zero experts]."""
    bias: Tensor
    """fp32 [FFN experts + zero experts]: `e_score_correction_bias`, or what a dial writes into."""
    n_routed_experts: int
    top_k: int
    routed_scaling_factor: float


class Output(NamedTuple):
    hidden_states: Tensor
    """bf16 [T, H], what is to be added to the residual, with the next norm."""
    residual: Tensor
    """bf16 [T, H]."""
    ids: Tensor
    """int32 [T, K], what was chosen, as in `Routing`."""


class DecoderLayer:
    """A whole layer of one rank that has all of it.

    Raises:
        ValueError: for norms in another dtype.
    """

    def __init__(self, halves: tuple[Half, Half], epsilon: float, router: Router, experts: Experts) -> None:
        """experts: from hidden states bf16 [T, H], and ids and weights [T, K] as of `Routing`, to bf16 [T, H]."""
        for half in halves:
            require_bf16(input_norm=half.input_norm, ffn_norm=half.ffn_norm)
        self._halves, self._epsilon, self._router, self._experts = halves, epsilon, router, experts

    @classmethod
    def of(
        cls, layer: Any, parts: Iterable[tuple[Mla | None, CompiledFFN | None]], experts: Experts
    ) -> DecoderLayer | None:
        """layer: an engine's decoder layer, with modules named as published; parts: its attentions and dense FFNs. None
        where one of these is."""
        halves, moe = [], layer.mlp
        norms = zip(layer.input_layernorm, layer.post_attention_layernorm, strict=True)
        for (before_attention, before_ffn), (attention, ffn) in zip(norms, parts, strict=True):
            if attention is None or ffn is None:
                return None
            halves.append(Half(before_attention.weight, attention, before_ffn.weight, ffn))
        config, router = moe.config, moe.router
        sizes = config.n_routed_experts, config.moe_topk, config.routed_scaling_factor
        choice = Router(moe.route, router.forward, router.bias, *sizes)
        return cls((halves[0], halves[1]), config.rms_norm_eps, choice, experts)

    def takes(self, tokens: int, cache: Tensor, batch: PagedBatch) -> bool:
        """Whether it is for so many tokens; a prompt's are for others."""
        return self._halves[0].attention.takes(tokens, cache, batch)

    def __call__(
        self,
        hidden_states: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        caches: Sequence[Tensor],
        slots: Tensor,
        batch: PagedBatch,
    ) -> Output:
        """hidden_states: bf16 [T, H], of which `takes` knows the number; residual: bf16 [T, H], to which they are to be
        added, or None in the first layer, where they are it; caches: of both attentions; the rest as of `Mla`."""
        (first, second), epsilon = self._halves, self._epsilon
        if residual is None:
            inputs, residual = rms_norm(hidden_states, first.input_norm, epsilon), hidden_states
        else:
            inputs, residual = add_rms_norm(hidden_states, residual, first.input_norm, epsilon)
        attended = first.attention(inputs, cos, sin, caches[0], slots, batch)
        assert attended is not None, "as it takes them"
        inputs, residual = add_rms_norm(attended, residual, first.ffn_norm, epsilon)

        route, logits, bias, experts, top_k, factor = self._router
        routing = route(logits(inputs), bias, n_routed_experts=experts, top_k=top_k, routed_scaling_factor=factor)
        routed = self._experts(inputs, routing.ids, routing.weights)
        identity = identity_share(inputs, routing.identity)

        outputs = first.ffn(inputs)
        assert outputs is not None, "as few rows as attention took"
        inputs, residual = add_rms_norm(outputs, residual, second.input_norm, epsilon)
        attended = second.attention(inputs, cos, sin, caches[1], slots, batch)
        assert attended is not None, "as the first"
        inputs, residual = add_rms_norm(attended, residual, second.ffn_norm, epsilon)
        outputs = second.ffn(inputs)
        assert outputs is not None, "as the first"
        return Output(outputs + routed, residual + identity, routing.ids)
