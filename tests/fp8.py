"""Releases of the tests' models in FP8 and bf16: their tensors, the numbers that they stand for, and its tokens."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.quantization import PUBLISHED_BLOCK, Quantization
from longcat_core.weights.blocks import FP8, dequantize_blocks, quantize_blocks
from longcat_core.weights.names import SCALE_SUFFIX
from tests.cases import DEFAULT, in_dtype, published, write_checkpoint
from tests.oracle import greedy, oracle

CLEAR = 0.05
"""Tokens are the exact model's wherever its two best logits are so far apart."""
VERY_CLEAR = 4 * CLEAR
"""As far as bf16 may move two logits, so that tokens are the exact model's whatever else is in the batch."""

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


class Release:
    """Of `CONFIG`, in FP8 or in bf16, and the exact model that it stands for."""

    def __init__(self, quantization: Quantization | None) -> None:
        """quantization: none of one in bf16."""
        self.config, tensors = replace(CONFIG, quantization=quantization), published(CONFIG)
        self.tensors = released(self.config, tensors) if quantization else in_dtype(tensors, torch.bfloat16)

    def write(self, directory: Path) -> Path:
        return write_checkpoint(directory, self.config, self.tensors)

    def assert_chooses_what_is_clear(self, answers: Sequence[Sequence[int]], prompts: Sequence[list[int]]) -> None:
        """Greedy answers are the exact model's up to the first choice that bf16 may change."""
        model, compared = oracle(replace(CONFIG, quantization=None), dequantised(self.tensors)), 0
        for answer, prompt in zip(answers, prompts, strict=True):
            exact = takewhile(lambda each: each.margin > VERY_CLEAR, greedy(model, prompt, len(answer)))
            clear = [each.token for each in exact]
            assert list(answer[: len(clear)]) == clear
            compared += len(clear)
        assert compared >= len(prompts), f"{compared} tokens are clear"
