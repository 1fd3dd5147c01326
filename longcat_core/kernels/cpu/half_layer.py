"""Half of a decoder layer in one call: an attention and a dense FFN, with the norms before them.

Reference: this folder's `rms_norm`, `Mla` and `CompiledFFN`, one after the other, to the bit.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from longcat_core.kernels.cpu.experts import CompiledFFN
from longcat_core.kernels.cpu.library import address_of, library, require_bf16, storages
from longcat_core.kernels.cpu.mla import Mla, ProjectionFields
from longcat_core.layers.latent_attention import PagedBatch


class _HalfLayer(ctypes.Structure):
    """`HalfLayer` of half_layer.cpp."""

    _fields_: ClassVar[Any] = [
        *((name, ctypes.c_void_p) for name in ("input_norm", "attention", "ffn_norm")),
        *((name, ProjectionFields) for name in ("gate_up", "down")),
        ("epsilon", ctypes.c_float),
    ]


class HalfLayerOutput(NamedTuple):
    """bf16 [T, H] each."""

    outputs: Tensor
    """Of the FFN, to be added to the residual."""
    inputs: Tensor
    """Of the FFN."""
    residual: Tensor


class HalfLayer:
    """Weights are read where they are, as of `Mla`.

    Raises:
        ValueError: for dtypes or strides that the kernels do not take, or sizes that do not fit.
    """

    def __init__(self, input_norm: Tensor, attention: Mla, ffn_norm: Tensor, ffn: CompiledFFN, epsilon: float) -> None:
        """input_norm and ffn_norm: bf16 [H]."""
        require_bf16(input_norm=input_norm, ffn_norm=ffn_norm)
        found = len(input_norm), len(ffn_norm), [*ffn.gate_up.weight.shape], [*ffn.down.weight.shape]
        hidden, inner = attention.hidden, ffn.down.weight.shape[1]
        wanted = hidden, hidden, [2 * inner, hidden], [hidden, inner]
        if found != wanted:
            raise ValueError(f"norms and projections of the FFN {found}, wanted {wanted}")
        self.attention = attention
        self._storages = storages(input_norm, ffn_norm, *ffn.gate_up, *ffn.down)
        self.fields = _HalfLayer(
            input_norm.data_ptr(),
            ctypes.addressof(attention.fields),
            ffn_norm.data_ptr(),
            ProjectionFields.of("gate_up", ffn.gate_up),
            ProjectionFields.of("down", ffn.down),
            epsilon,
        )

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        slots: Tensor,
        batch: PagedBatch,
    ) -> HalfLayerOutput | None:
        """x: bf16 [T, H]; residual: bf16 [T, H], to which x is to be added, or None where x is the residual; the rest,
        and what is raised, as of `Mla`. None where that returns it."""
        tokens = self.attention.tokens(x, cos, sin, cache, slots, batch)
        if tokens is None:
            return None
        if residual is not None:
            require_bf16(residual=residual)
            if residual.shape != x.shape:
                raise ValueError(f"residual: {[*residual.shape]}, wanted {[*x.shape]} as x has")
        made = HalfLayerOutput(*x.new_empty(3, *x.shape).unbind())
        library().longcat_half_layer(
            ctypes.byref(self.fields),
            *(each.data_ptr() for each in made),
            x.data_ptr(),
            x.stride(0),
            address_of(residual),
            0 if residual is None else residual.stride(0),
            ctypes.byref(tokens.fields),
        )
        return made
