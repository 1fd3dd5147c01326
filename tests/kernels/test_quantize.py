"""Activations in FP8 against core's arithmetic of blocks."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longcat_core.kernels.quantize import quantize
from longcat_core.weights.blocks import quantize_blocks


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 5),
    columns=st.sampled_from([1, 64, 128, 200, 1000, 2176]),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_codes_and_scales_are_those_of_the_reference(
    seed: int, rows: int, columns: int, spread: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(rows, columns, generator=generator)
    numbers *= torch.exp(spread * torch.randn(rows, columns, generator=generator)).clamp(max=1e4 / 5)
    numbers = numbers.to(dtype)
    codes, scales = quantize(numbers)
    if rows:
        wanted_codes, wanted_scales = quantize_blocks(numbers, (1, 128))
        assert torch.equal(scales, wanted_scales)
        assert torch.equal(codes.view(torch.uint8), wanted_codes.view(torch.uint8))
    assert (codes.shape, codes.dtype) == ((rows, columns), torch.float8_e4m3fn)
    assert (scales.shape, scales.dtype) == ((rows, -(-columns // 128)), torch.float32)


def test_a_group_of_zeros_has_a_scale_of_one() -> None:
    codes, scales = quantize(torch.zeros(2, 256))
    assert codes.float().eq(0).all()
    assert scales.eq(1).all()


def test_rows_that_are_not_contiguous_are_an_error() -> None:
    with pytest.raises(ValueError, match="wanted a contiguous tensor"):
        quantize(torch.zeros(4, 6).T)
