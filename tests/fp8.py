"""FP8 releases of the tests' models: tensors as published in FP8, and the numbers that they stand for."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.quantization import PUBLISHED_BLOCK, Quantization
from longcat_core.weights.blocks import FP8, dequantize_blocks, quantize_blocks
from longcat_core.weights.names import SCALE_SUFFIX
from tests.cases import DEFAULT, in_dtype

# Blocks of 128 x 128 fit every layer on two ranks, but `kv_a_proj_with_mqa`, whose last block has 96 rows.
CONFIG = replace(
    DEFAULT,
    hidden_size=128,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=64,
    ffn_hidden_size=256,
    expert_ffn_hidden_size=256,
    quantization=Quantization("fp8"),
)


def released(config: LongcatConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """fp32 tensors as a release of this configuration has them: in FP8 with scales, or in bf16; the router in fp32."""
    quantization = config.quantization
    assert quantization is not None
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if quantization.is_fp8(name):
            found[name], found[name + SCALE_SUFFIX] = quantize_blocks(tensor, quantization.block)
        else:
            found |= in_dtype({name: tensor}, torch.bfloat16)
    return found


def dequantised(
    release: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, block: tuple[int, int] = PUBLISHED_BLOCK
) -> dict[str, Tensor]:
    """The model that a release stands for: FP8 times scales, rounded to `dtype`; the rest in it, but the router."""
    numbers = {
        name: dequantize_blocks(tensor, release[name + SCALE_SUFFIX], block=block) if tensor.dtype == FP8 else tensor
        for name, tensor in release.items()
        if not name.endswith(SCALE_SUFFIX)
    }
    return in_dtype(numbers, dtype)
