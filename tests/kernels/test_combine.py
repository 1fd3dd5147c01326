"""The weighted sum of choices against a loop over them in fp64, with NaN wherever nothing may be read."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longcat_core.kernels.combine import weighted_sum
from longcat_core.layers import experts as reference

UNIT = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def choices(seed: int, tokens: int, top_k: int, kept: float, hidden: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments by choice; outputs and weights of a choice of -1 are NaN, and so is the memory of the result."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 128, (tokens, top_k), generator=generator, dtype=torch.int32)
    dropped = torch.rand(tokens, top_k, generator=generator) >= kept
    outputs = torch.randn(tokens, top_k, hidden, generator=generator).to(dtype)
    return {
        "outputs": outputs.masked_fill(dropped.unsqueeze(2), float("nan")),
        "ids": ids.masked_fill(dropped, -1),
        "weights": torch.rand(tokens, top_k, generator=generator).masked_fill(dropped, float("nan")),
        "result": torch.full((tokens, hidden), float("nan"), dtype=dtype),
    }


def loop(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The sum in fp64, and that of its terms' magnitudes."""
    kept = (given["ids"] >= 0).unsqueeze(2)
    terms = (given["weights"].double().unsqueeze(2) * given["outputs"].double()).masked_fill(~kept, 0.0)
    return terms.sum(1), terms.abs().sum(1)


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 5),
    top_k=st.integers(1, 16),
    kept=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    hidden=st.sampled_from([1, 24, 33, 1030]),
    dtype=st.sampled_from(list(UNIT)),
)
def test_a_token_is_the_sum_of_its_choices(
    seed: int, tokens: int, top_k: int, kept: float, hidden: int, dtype: torch.dtype
) -> None:
    given = choices(seed, tokens, top_k, kept, hidden, dtype)
    ours = weighted_sum(**given)
    assert ours is given["result"]
    truth, terms = loop(given)
    # One rounding of the result, which may be a subnormal number, and one in fp32 for each term.
    size = truth.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    assert ((ours.double() - truth).abs() <= UNIT[dtype] / 2 * size + (top_k + 1) * 2**-23 * terms).all()


def test_the_reference_sums_the_same() -> None:
    given = choices(0, 6, 4, 0.6, 40, torch.float32)
    rows = reference.compact(given["ids"], given["weights"])
    outputs = given["outputs"].flatten(0, 1)[(given["ids"] >= 0).flatten()] * rows.weights.unsqueeze(1)
    torch.testing.assert_close(weighted_sum(**given), reference.combine(outputs, rows.tokens, 6))


def test_a_batch_of_zero_experts_alone_reads_no_output() -> None:
    assert weighted_sum(**choices(0, 3, 12, 0.0, 40, torch.float16)).eq(0).all()


def test_a_token_has_the_same_bits_in_any_batch() -> None:
    given = choices(1, 6, 12, 0.6, 70, torch.float16)
    batch = weighted_sum(**given).clone()
    for token in range(6):
        alone = weighted_sum(**{name: tensor[token : token + 1] for name, tensor in given.items()})
        assert torch.equal(alone[0], batch[token])


def test_outputs_in_bf16_are_summed_in_fp32() -> None:
    """bf16 has 8 bits: 256 and 1 is 256 again, as often as it is added."""
    outputs = torch.tensor([256.0] + [1.0] * 8, dtype=torch.bfloat16).reshape(1, 9, 1)
    ids, result = torch.zeros(1, 9, dtype=torch.int32), torch.empty(1, 1, dtype=torch.bfloat16)
    assert weighted_sum(outputs, ids, torch.ones(1, 9), result).tolist() == [[264.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": torch.zeros(3, 4, 7)}, r"outputs of shape \(3, 4, 7\) .* wanted \(3, 4, 8\)"),
        ({"outputs": torch.zeros(5, 8)}, r"outputs of shape \(5, 8\) .* wanted \(3, 4, 8\)"),
        (
            {"ids": torch.zeros(2, 4), "outputs": torch.zeros(2, 4, 8)},
            r"for \(2, 4\) choices of hidden states \(3, 8\)",
        ),
        ({"result": torch.zeros(8, 3).T}, "wanted contiguous tensors"),
    ],
)
def test_shapes_that_do_not_fit_are_an_error(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_sum(**{**choices(0, 3, 4, 0.5, 8, torch.float32), **change})
