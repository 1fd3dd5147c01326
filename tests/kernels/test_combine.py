"""The end of an MoE layer against a loop over choices in fp64, with NaN wherever nothing may be read."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longcat_core.kernels.combine import combine, weighted_sum
from longcat_core.layers import experts as reference

UNIT = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def choices(seed: int, tokens: int, top_k: int, kept: float, hidden: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments by choice; outputs and weights of a choice of -1 are NaN."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 128, (tokens, top_k), generator=generator, dtype=torch.int32)
    dropped = torch.rand(tokens, top_k, generator=generator) >= kept
    outputs = torch.randn(tokens, top_k, hidden, generator=generator).to(dtype)
    return {
        "outputs": outputs.masked_fill(dropped.unsqueeze(2), float("nan")),
        "rows": ids.masked_fill(dropped, -1),
        "weights": torch.rand(tokens, top_k, generator=generator).masked_fill(dropped, float("nan")),
        "hidden_states": torch.randn(tokens, hidden, generator=generator).to(dtype),
        "identity": torch.rand(tokens, generator=generator),
        "dense": torch.randn(tokens, hidden, generator=generator).to(dtype),
    }


def by_row(given: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same choices over a list of rows in any order, with rows of NaN that nobody names."""
    slots = (given["rows"] >= 0).flatten().nonzero().squeeze(1)
    order = torch.randperm(slots.numel() + 3, generator=torch.Generator().manual_seed(seed))[: slots.numel()]
    outputs = given["outputs"].new_full((slots.numel() + 3, given["outputs"].shape[2]), float("nan"))
    outputs[order] = given["outputs"].flatten(0, 1)[slots]
    rows = torch.full_like(given["rows"], -1)
    rows.flatten()[slots] = order.int()
    return {**given, "outputs": outputs, "rows": rows}


def loop(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The sum in fp64, and that of its terms' magnitudes."""
    kept = (given["rows"] >= 0).unsqueeze(2)
    terms = (given["weights"].double().unsqueeze(2) * given["outputs"].double()).masked_fill(~kept, 0.0)
    own = given["identity"].double().unsqueeze(1) * given["hidden_states"].double()
    dense = torch.zeros_like(own) if given["dense"] is None else given["dense"].double()
    return terms.sum(1) + own + dense, terms.abs().sum(1) + own.abs() + dense.abs()


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 5),
    top_k=st.integers(1, 16),
    kept=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    hidden=st.sampled_from([1, 24, 33, 1030]),
    dtype=st.sampled_from(list(UNIT)),
    has_dense=st.booleans(),
    is_by_row=st.booleans(),
)
def test_a_token_is_the_sum_of_its_choices(
    seed: int, tokens: int, top_k: int, kept: float, hidden: int, dtype: torch.dtype, has_dense: bool, is_by_row: bool
) -> None:
    given = choices(seed, tokens, top_k, kept, hidden, dtype)
    given["dense"] = given["dense"] if has_dense else None
    ours = combine(**(by_row(given, seed) if is_by_row else given))
    truth, terms = loop(given)
    assert (ours.dtype, ours.shape) == (dtype, (tokens, hidden))
    # One rounding of the result, which may be a subnormal number, and one in fp32 for each term.
    size = truth.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    assert ((ours.double() - truth).abs() <= UNIT[dtype] / 2 * size + (top_k + 3) * 2**-23 * terms).all()


def test_the_reference_sums_the_same() -> None:
    given = choices(0, 6, 4, 0.6, 40, torch.float32)
    given["dense"] = None
    rows = reference.compact(given["rows"], given["weights"])
    outputs = given["outputs"].flatten(0, 1)[(given["rows"] >= 0).flatten()] * rows.weights.unsqueeze(1)
    routed = reference.combine(outputs, rows.tokens, 6)
    theirs = reference.add_identity(routed, given["hidden_states"], given["identity"])
    torch.testing.assert_close(combine(**given), theirs)


@pytest.mark.parametrize("is_by_row", [False, True])
def test_the_sum_of_the_experts_alone_is_written_where_it_is_asked_for(is_by_row: bool) -> None:
    given = choices(2, 5, 12, 0.5, 40, torch.float32)
    truth, _ = loop({**given, "identity": torch.zeros(5), "dense": None})
    given = by_row(given, 2) if is_by_row else given
    result = torch.full((5, 40), float("nan"))
    assert weighted_sum(given["outputs"], given["rows"], given["weights"], result) is result
    torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_by_row", [False, True])
def test_a_batch_of_zero_experts_alone_reads_no_output(is_by_row: bool) -> None:
    given = choices(0, 3, 12, 0.0, 40, torch.float16)
    given["dense"] = None
    ours = combine(**(by_row(given, 0) if is_by_row else given))
    torch.testing.assert_close(ours, (given["identity"].unsqueeze(1) * given["hidden_states"].float()).half())


def test_a_token_has_the_same_bits_in_any_batch_and_layout() -> None:
    given = choices(1, 6, 12, 0.6, 70, torch.float16)
    batch = combine(**given)
    assert torch.equal(batch, combine(**by_row(given, 0)))
    for token in range(6):
        alone = combine(**{name: tensor[token : token + 1] for name, tensor in given.items()})
        assert torch.equal(alone[0], batch[token])


def test_outputs_in_bf16_are_summed_in_fp32() -> None:
    """bf16 has 8 bits: 256 and 1 is 256 again, as often as it is added."""
    outputs = torch.tensor([256.0] + [1.0] * 8, dtype=torch.bfloat16).reshape(1, 9, 1)
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    ids = torch.zeros(1, 9, dtype=torch.int32)
    assert combine(outputs, ids, torch.ones(1, 9), x, torch.zeros(1)).tolist() == [[264.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": torch.zeros(3, 4, 7)}, r"outputs of shape \(3, 4, 7\) .* wanted \(3, 4, 8\)"),
        ({"outputs": torch.zeros(5, 7)}, r"outputs of shape \(5, 7\) .* wanted \(5, 8\)"),
        (
            {"rows": torch.zeros(2, 4), "outputs": torch.zeros(2, 4, 8)},
            r"for \(2, 4\) choices of hidden states \(3, 8\)",
        ),
        ({"dense": torch.zeros(8, 3).T}, "wanted contiguous tensors"),
    ],
)
def test_shapes_that_do_not_fit_are_an_error(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine(**{**choices(0, 3, 4, 0.5, 8, torch.float32), **change})
