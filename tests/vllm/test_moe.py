"""vLLM's CPU kernels, given the rows of FFN experts of a rank, are the reference."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longcat_core.kernels.cpu.library import description, is_available, multiplies_bf16
from longcat_core.layers.experts import moe
from longcat_core.layers.routing import Routing
from longcat_vllm import devices
from longcat_vllm.devices.cuda.device import Cuda
from tests.cases import DEFAULT, Case
from tests.oracle import relative_error
from tests.vllm.engine import serving


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Routing]:
    """Inputs, weights and any routing, the extremes among them, of shapes that the fast kernels take."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens, top_k = draw(st.integers(1, 70)), draw(st.integers(1, 6))
    experts, hidden, inner = draw(st.integers(1, 9)), 32 * draw(st.integers(1, 4)), 32 * draw(st.integers(1, 3))
    x = torch.randn(tokens, hidden, generator=generator)
    w13 = torch.randn(experts, 2 * inner, hidden, generator=generator) * hidden**-0.5
    w2 = torch.randn(experts, hidden, inner, generator=generator) * inner**-0.5
    zero_share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    is_zero = torch.rand(tokens, top_k, generator=generator) < zero_share
    ids = torch.randint(experts, (tokens, top_k), generator=generator, dtype=torch.int32).masked_fill(is_zero, -1)
    weights = torch.rand(tokens, top_k, generator=generator).masked_fill(is_zero, 0.0)
    return x, w13, w2, Routing(ids, weights, torch.zeros(tokens))


def assert_kernel_is_reference(kernel: str, ranks: int, layer: tuple[Tensor, Tensor, Tensor, Routing]) -> None:
    """Against core's `moe` in fp64: the sum of the shares of ranks that have the experts between them."""
    from longcat_vllm.devices.cpu.experts import CPU_KERNELS

    x, w13, w2, routing = layer
    pack = CPU_KERNELS[kernel].pack
    total = torch.zeros(x.shape, dtype=torch.float64)
    for mine in torch.arange(w13.shape[0]).tensor_split(ranks):
        expert_map = torch.full((w13.shape[0],), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(mine.numel(), dtype=torch.int32)
        total += torch.ops.longcat.cpu_experts(
            x, routing.ids, routing.weights, pack(w13[mine]), pack(w2[mine]), None, None, expert_map, kernel
        ).double()
    truth = moe(x.double(), routing, w13.double(), w2.double())
    if routing.ids.max() < 0:
        assert not total.any()
    else:
        assert relative_error(total, truth) < (2e-2 if x.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("kernel", ["bf16_dot", "compiled", "vector", "torch"])
@pytest.mark.parametrize("ranks", [1, 2])
@settings(max_examples=25, deadline=None)
@given(layer=layers())
def test_every_cpu_kernel_is_the_reference(
    kernel: str, ranks: int, layer: tuple[Tensor, Tensor, Tensor, Routing]
) -> None:
    dtype = torch.bfloat16 if kernel in ("bf16_dot", "compiled") else torch.float32
    if kernel == "bf16_dot" and not multiplies_bf16():
        pytest.skip("this CPU has neither AVX512-BF16 nor AMX")
    if kernel == "compiled" and not is_available():
        pytest.skip(description())
    *tensors, routing = layer
    x, w13, w2 = (tensor.to(dtype) for tensor in tensors)
    assert_kernel_is_reference(kernel, min(ranks, w13.shape[0]), (x, w13, w2, routing))


def test_off_the_cpu_there_is_always_an_expert_map(
    checkpoint_of: Callable[[Case], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one, vLLM's kernels sum the slots of zero experts uninitialised."""
    case = Case(DEFAULT)
    with serving(checkpoint_of(case)) as served:
        experts = served.model.model.layers[0].mlp.experts.routed_experts
        monkeypatch.setattr(devices, "current", Cuda)
        experts.update_expert_map_info()
        assert experts.expert_map.tolist() == list(range(case.config.n_routed_experts))
