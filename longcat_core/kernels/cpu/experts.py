"""All FFN experts of a layer in one call, in bf16 or FP8, sums in fp32. Reference: `layers.experts.routed_experts`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor

from longcat_core.kernels.cpu.library import (
    address_of,
    has_tiles,
    library,
    padded,
    require_bf16,
    require_weight,
)
from longcat_core.kernels.cpu.product import FEW_ROWS, Projection
from longcat_core.layers import experts as layers
from longcat_core.layers.experts import SparseFFN
from longcat_core.quantization import PUBLISHED_BLOCK

FEW_TOKENS = 64
"""Of more, torch multiplies with AMX where the processor has it, one product an expert. Ours do not use AMX."""


class CompiledExperts(SparseFFN):
    """`routed_experts` with its weights, and with scales where these are in FP8; torch for many tokens with AMX."""

    def __init__(
        self, w13: Tensor, w2: Tensor, w13_scales: Tensor | None = None, w2_scales: Tensor | None = None
    ) -> None:
        self._weights = w13, w2, w13_scales, w2_scales
        self._of_torch = layers.grouped_ffn(w13, w2) if w13_scales is None and has_tiles() else None

    def __call__(self, rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        if self._of_torch is not None and len(rows) > FEW_TOKENS:
            return layers.routed_experts(rows, experts, weights, self._of_torch)
        return routed_experts(rows, experts, weights, *self._weights)


class CompiledFFN:
    """A dense SwiGLU: the only expert, which every token has, with all of it."""

    def __init__(self, gate_up: Projection, down: Projection) -> None:
        """gate_up: [2 I, H], gate above up; down: [H, I].

        Raises:
            ValueError: for what `of` returns None for.
        """
        if obstacle := self._obstacle(gate_up, down):
            raise ValueError(f"weights of a dense FFN: {obstacle}")
        self.gate_up, self.down = gate_up, down
        self._weights = gate_up.weight.unsqueeze(0), down.weight.unsqueeze(0)
        self._scales = [None if each.scales is None else each.scales.unsqueeze(0) for each in (gate_up, down)]
        self._ids = torch.zeros(FEW_ROWS, 1, dtype=torch.int32)
        self._shares = torch.ones(FEW_ROWS, 1)

    @classmethod
    def of(cls, gate_up: Projection, down: Projection) -> CompiledFFN | None:
        """None where one weight is in FP8 and the other is not, or where a block of scales would have rows of both gate
        and up."""
        return None if cls._obstacle(gate_up, down) else cls(gate_up, down)

    @staticmethod
    def _obstacle(gate_up: Projection, down: Projection) -> str:
        """Why they are not for the kernel; empty if they are."""
        if (gate_up.scales is None) != (down.scales is None):
            return "one has scales, wanted both or none"
        inner, rows = down.weight.shape[1], PUBLISHED_BLOCK[0]
        if gate_up.scales is not None and inner % rows:
            return f"scales of an inner size of {inner}, wanted a multiple of {rows}"
        return ""

    def __call__(self, x: Tensor) -> Tensor | None:
        """bf16 [T, H] -> [T, H], or None where two products are quicker, with many tokens."""
        tokens = len(x)
        if not 0 < tokens <= FEW_ROWS:
            return None
        return routed_experts(x, self._ids[:tokens], self._shares[:tokens], *self._weights, *self._scales)


def routed_experts(
    hidden_states: Tensor,
    ids: Tensor,
    weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scales: Tensor | None = None,
    w2_scales: Tensor | None = None,
) -> Tensor:
    """`sum_k w_k FFN_k(x)`: bf16 [T, H]. Weights are read as they are published, once for all rows of an expert.

    hidden_states: bf16 [T, H]; ids: int32 [T, K], of these experts, or -1 for none, which costs nothing; weights: fp32
    [T, K]; w13: [E, 2 I, H], gate above up; w2: [E, H, I]; both bf16, or FP8 (e4m3) with scales, fp32, one for each
    block of 128 x 128 of gate, up and down projection: [E, 2 ceil(I / 128), ceil(H / 128)] and [E, ceil(H / 128),
    ceil(I / 128)].

    Raises:
        ValueError: for other dtypes, sizes or strides.
        RuntimeError: if the library is not there.
    """
    (tokens, hidden), (experts, _, inner), top_k = hidden_states.shape, w2.shape, ids.shape[1]
    require_bf16(hidden_states=hidden_states)
    if not (w13.is_contiguous() and w2.is_contiguous()):
        raise ValueError(f"w13, w2: strides {w13.stride()} and {w2.stride()}, wanted contiguous ones")
    if w13.shape != (experts, 2 * inner, hidden) or w2.shape[1] != hidden or weights.shape != ids.shape:
        raise ValueError(
            f"hidden_states {[*hidden_states.shape]}, ids {[*ids.shape]}, weights {[*weights.shape]}, w13 "
            f"{[*w13.shape]}, w2 {[*w2.shape]}: wanted [T, H], [T, K], [T, K], [E, 2 I, H] and [E, H, I]"
        )
    if (w13_scales is None) != (w2_scales is None):
        raise ValueError(
            f"scales of {'w2' if w13_scales is None else 'w13'} alone, wanted those of both weights, or none"
        )
    scales = None if w13_scales is None else w13_scales.unflatten(1, (2, -1))
    require_weight("w13", w13.unflatten(1, (2, inner)), scales)  # gate and up have blocks of their own
    require_weight("w2", w2, w2_scales)
    output = hidden_states.new_empty(tokens, hidden)
    if tokens:
        ids, weights = ids.int().contiguous(), weights.float().contiguous()
        scratch = torch.empty(tokens * (padded(hidden) + top_k * padded(inner)), dtype=torch.float32)
        library().longcat_experts(
            output.data_ptr(),
            hidden_states.data_ptr(),
            hidden_states.stride(0),
            ids.data_ptr(),
            weights.data_ptr(),
            w13.data_ptr(),
            w2.data_ptr(),
            address_of(w13_scales),
            address_of(w2_scales),
            scratch.data_ptr(),
            tokens,
            top_k,
            experts,
            hidden,
            inner,
        )
    return output
