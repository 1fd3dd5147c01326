"""Is a result right? The MoE layer in fp32 on the same numbers, and the measure that every result is held to."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.inputs import Batch
from longcat_core.kernels.experts import ExpertWeights
from longcat_core.layers.experts import ffn_by_expert, routed_experts
from longcat_core.weights.blocks import dequantize_blocks

LIMITS = {"16 bit": 0.02, "fp8": 0.05}
"""Of `worst_token_error`. bf16 rounds to 2^-9 of a number, three times; in FP8 a kernel may round what is between the
products to bf16 first, and some numbers then go to the next of e4m3, which is up to 2^-3 away."""


class WrongResultError(ValueError):
    """A kernel's result is not the reference's: there is no point in its time."""


def truth(batch: Batch, weights: ExpertWeights) -> Tensor:
    """fp32 [R, H]: the layer, with activations rounded to FP8 where the kernels round them, and nothing else."""
    rounded = _rounded_to_fp8 if weights.is_fp8 else torch.Tensor.float
    ffn = ffn_by_expert(
        weights.w2.shape[0],
        gate_up=lambda expert, rows: F.linear(rounded(rows), _widened(weights.w13, weights.w13_scales, expert)),
        down=lambda expert, rows: F.linear(rounded(rows), _widened(weights.w2, weights.w2_scales, expert)),
    )
    x, routing = batch.hidden_states.float(), batch.routing
    routed = routed_experts(x, batch.local_ids, routing.weights, ffn)
    return routed + routing.identity.unsqueeze(-1) * x


def worst_token_error(found: Tensor, wanted: Tensor) -> float:
    """The greatest error of a token's vector, over the mean length of one. NaN counts as infinite."""
    if not wanted.numel():
        return 0.0
    error = (found.float() - wanted).norm(dim=-1).nan_to_num(nan=float("inf")).max()
    return float(error / wanted.norm(dim=-1).mean().clamp(min=1e-30))


def check(found: Tensor, wanted: Tensor, limit: float) -> float:
    """The worst token's error, if it is within the limit.

    Raises:
        WrongResultError: if it is not.
    """
    if found.shape != wanted.shape:
        raise WrongResultError(f"result of shape {tuple(found.shape)}: wanted {tuple(wanted.shape)}")
    error = worst_token_error(found, wanted)
    if error > limit:
        raise WrongResultError(f"worst token's error {error:.2e}: wanted at most {limit}")
    return error


def _widened(weight: Tensor, scales: Tensor | None, expert: int) -> Tensor:
    return weight[expert].float() if scales is None else dequantize_blocks(weight[expert], scales[expert])


def _rounded_to_fp8(rows: Tensor) -> Tensor:
    """To FP8 with a scale for each 128, and back: `weights.blocks.quantize_blocks` of single rows."""
    groups = F.pad(rows.float(), (0, -rows.shape[1] % 128)).unflatten(1, (-1, 128))
    greatest = groups.abs().amax(dim=2, keepdim=True)
    scales = torch.where(greatest > 0, greatest / 448, 1.0)
    codes = (groups / scales).to(torch.float8_e4m3fn).float()
    return (codes * scales).flatten(1)[:, : rows.shape[1]]
