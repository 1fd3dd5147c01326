"""oneDNN's packed experts against their reference in higher precision."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longcat_core.kernels import packed_experts
from longcat_core.layers.experts import grouped_ffn, routed_experts
from tests.oracle import relative_error

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if packed_experts.is_supported(dtype)]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def test_fp32_is_supported_wherever_torch_has_onednn() -> None:
    assert packed_experts.is_supported(torch.float32) == torch.backends.mkldnn.is_available()
    assert not packed_experts.is_supported(torch.float64)


@pytest.mark.skipif(not DTYPES, reason="this torch has no oneDNN")
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 40),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 5),
    hidden=st.integers(4, 70),  # one number alone may be a difference of two that are far greater
    inner=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES or [None]),
)
def test_packed_experts_are_the_reference(
    seed: int, tokens: int, experts: int, top_k: int, hidden: int, inner: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    w13 = (torch.randn(experts, 2 * inner, hidden, generator=generator) * hidden**-0.5).to(dtype)
    w2 = (torch.randn(experts, hidden, inner, generator=generator) * inner**-0.5).to(dtype)
    ids = torch.randint(-1, experts, (tokens, top_k), generator=generator, dtype=torch.int32)
    weights = torch.rand(tokens, top_k, generator=generator)
    truth = routed_experts(x.double(), ids, weights.double(), grouped_ffn(w13.double(), w2.double()))
    packed = packed_experts.PackedExperts(w13.clone(), w2.clone())
    ours = routed_experts(x, ids, weights, packed)
    assert ours.dtype == dtype
    assert relative_error(ours, truth) < ROUNDING[dtype]
    assert all(map(torch.equal, packed.unpack(), (w13, w2)))
