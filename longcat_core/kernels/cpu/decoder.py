"""A decoder layer for few tokens, in this folder's kernels. Reference: an engine's own modules, to the bit."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from longcat_core.kernels.cpu.experts import CompiledFFN
from longcat_core.kernels.cpu.half_layer import HalfLayer
from longcat_core.kernels.cpu.mla import Mla
from longcat_core.layers.experts import identity_share
from longcat_core.layers.latent_attention import PagedBatch
from longcat_core.layers.routing import Routing

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    """A whole layer of one rank that has all of it."""

    def __init__(self, halves: tuple[HalfLayer, HalfLayer], router: Router, experts: Experts) -> None:
        """experts: from hidden states bf16 [T, H], and ids and weights [T, K] as of `Routing`, to bf16 [T, H]."""
        self._halves, self._router, self._experts = halves, router, experts

    @classmethod
    def of(
        cls, layer: Any, parts: Iterable[tuple[Mla | None, CompiledFFN | None]], experts: Experts
    ) -> DecoderLayer | None:
        """layer: an engine's decoder layer, with modules named as published; parts: its attentions and dense FFNs. None
        where one of these is."""
        halves, moe, config = [], layer.mlp, layer.mlp.config
        norms = zip(layer.input_layernorm, layer.post_attention_layernorm, strict=True)
        for (before_attention, before_ffn), (attention, ffn) in zip(norms, parts, strict=True):
            if attention is None or ffn is None:
                return None
            halves.append(HalfLayer(before_attention.weight, attention, before_ffn.weight, ffn, config.rms_norm_eps))
        router = moe.router
        sizes = config.n_routed_experts, config.moe_topk, config.routed_scaling_factor
        choice = Router(moe.route, router.forward, router.bias, *sizes)
        return cls((halves[0], halves[1]), choice, experts)

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
        first, second = self._halves
        before = first(hidden_states, residual, cos, sin, caches[0], slots, batch)
        assert before is not None, "as attention takes them"
        route, logits, bias, experts, top_k, factor = self._router
        scores = logits(before.inputs)
        routing = route(scores, bias, n_routed_experts=experts, top_k=top_k, routed_scaling_factor=factor)
        routed = self._experts(before.inputs, routing.ids, routing.weights)
        identity = identity_share(before.inputs, routing.identity)
        after = second(before.outputs, before.residual, cos, sin, caches[1], slots, batch)
        assert after is not None, "as the first"
        return Output(after.outputs + routed, after.residual + identity, routing.ids)
