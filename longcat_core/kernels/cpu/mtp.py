"""The MTP layer for few tokens, in this folder's kernels. Reference: an engine's own modules."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from longcat_core.kernels.cpu.experts import CompiledFFN
from longcat_core.kernels.cpu.library import require_bf16
from longcat_core.kernels.cpu.mla import Mla
from longcat_core.kernels.cpu.norm import add_rms_norm, rms_norm
from longcat_core.kernels.cpu.product import Projection, product
from longcat_core.layers.latent_attention import PagedBatch


class Norms(NamedTuple):
    """Weights, bf16 [H] each."""

    embedded: Tensor
    hidden: Tensor
    attention: Tensor
    ffn: Tensor
    last: Tensor

    @classmethod
    def of(cls, layer: Any, last: Any) -> Norms:
        """layer: an engine's MTP layer, with modules named as published; last: the norm after it."""
        norms = layer.enorm["m"], layer.hnorm["m"], layer.input_layernorm, layer.post_attention_layernorm, last
        return cls(*(norm.weight for norm in norms))


class MtpLayer:
    """`eh_proj([norm(embedding of the next token), norm(hidden)])`, an attention, a dense FFN and the last norm, of one
    rank that has all of it.

    Raises:
        ValueError: for norms in another dtype.
    """

    def __init__(self, norms: Norms, epsilon: float, eh_proj: Projection, mla: Mla, ffn: CompiledFFN) -> None:
        require_bf16(**norms._asdict())
        self._norms, self._epsilon, self._eh_proj, self._mla, self._ffn = norms, epsilon, eh_proj, mla, ffn

    def __call__(
        self,
        embedded: Tensor,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        slots: Tensor,
        batch: PagedBatch,
    ) -> Tensor | None:
        """embedded and hidden_states: bf16 [T, H]; the rest as of `Mla`. Returns bf16 [T, H], the `hidden_states` of
        the next step; None where `Mla` returns it."""
        if not self._mla.takes(len(embedded), cache, batch):
            return None
        norms, epsilon = self._norms, self._epsilon
        parts = rms_norm(embedded, norms.embedded, epsilon), rms_norm(hidden_states, norms.hidden, epsilon)
        residual = product(torch.cat(parts, dim=-1), *self._eh_proj)
        attended = self._mla(rms_norm(residual, norms.attention, epsilon), cos, sin, cache, slots, batch)
        assert attended is not None, "as it takes them"
        inputs, residual = add_rms_norm(attended, residual, norms.ffn, epsilon)
        outputs = self._ffn(inputs)
        assert outputs is not None, "as few rows as attention took"
        return add_rms_norm(outputs, residual, norms.last, epsilon)[0]
