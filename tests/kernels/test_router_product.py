"""Router logits against fp64: as good as three products in bf16 can be, and better than one."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longcat_core.kernels.router_product import router_product


def problem(seed: int, tokens: int, experts: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    return x, torch.randn(experts, hidden, generator=generator) * hidden**-0.5


def error(logits: Tensor, x: Tensor, weight: Tensor) -> float:
    """The greatest error over the sum of the terms' magnitudes, which may cancel."""
    truth, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    return float(((logits.double() - truth).abs() / terms).max())


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 70),
    experts=st.sampled_from([1, 12, 33, 70]),
    hidden=st.sampled_from([1, 16, 65, 200]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_logits_are_those_of_fp64(seed: int, tokens: int, experts: int, hidden: int, dtype: torch.dtype) -> None:
    x, weight = problem(seed, tokens, experts, hidden, dtype)
    logits = router_product(x, weight)
    assert (logits.dtype, logits.shape) == (torch.float32, (tokens, experts))
    if tokens:
        # Twice the two parts' own rounding of 2^-17, their product of at most 2^-16 that is left out, and fp32's sums.
        assert error(logits, x, weight) < 2 * 2**-17 + 2**-16 + 8 * 2**-23


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_published_width_it_is_a_hundred_times_better_than_bf16(dtype: torch.dtype) -> None:
    x, weight = problem(0, 3, 40, 6144, dtype)
    in_bf16 = error((x.bfloat16().double() @ weight.bfloat16().double().T).float(), x, weight)
    logits, truth = router_product(x, weight), x.double() @ weight.double().T
    assert error(logits, x, weight) < in_bf16 / 100
    assert (logits.double() - truth).abs().max() < 1e-5 * truth.abs().max()


def test_each_of_the_three_products_counts() -> None:
    """Numbers that are nothing but a high or a low part."""
    low = 2.0**-12
    x, weight = torch.tensor([[1.0 + low]]), torch.tensor([[1.0 + low], [1.0]])
    assert router_product(x, weight).tolist() == [[1.0 + 2 * low, 1.0 + low]]


def test_a_token_has_the_same_logits_in_any_batch() -> None:
    x, weight = problem(1, 70, 40, 200, torch.float32)
    batch = router_product(x, weight)
    for token in (0, 3, 69):
        assert torch.equal(router_product(x[token : token + 1], weight)[0], batch[token])


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(1, 8, dtype=torch.float16), torch.zeros(4, 8), "hidden states in torch.float16: wanted"),
        (torch.zeros(1, 7), torch.zeros(4, 8), r"weight of \(4, 8\) in torch.float32: wanted width 7"),
        (torch.zeros(1, 8), torch.zeros(4, 8).bfloat16(), "in torch.bfloat16: wanted width 8, .* in torch.float32"),
        (torch.zeros(8, 2).T, torch.zeros(4, 8), "wanted contiguous tensors"),
        (torch.zeros(2, 8), torch.zeros(8, 4).T, "wanted contiguous tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_an_error(x: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router_product(x, weight)
