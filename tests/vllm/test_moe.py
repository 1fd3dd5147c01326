"""vLLM's experts are given the rows of FFN experts and nothing else, counted; and what that means for its ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longcat_core.experts import moe
from longcat_core.reference import LongcatForCausalLM, Router
from longcat_core.routing import Routing
from tests.cases import CASES, Case
from tests.oracle import relative_error
from tests.vllm.engine import serving


@pytest.mark.parametrize("name", ["default", "all_slots_zero_experts", "no_zero_experts"])
def test_zero_experts_cost_no_gemm_rows(
    name: str, checkpoint_of: Callable[[Case], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that vLLM's kernel is given for a prompt are the slots in which the reference takes FFN experts."""
    from longcat_vllm import cpu_experts

    case, rows = CASES[name], []

    def counting(kernel: str) -> Callable[[Tensor, Tensor], Callable[..., Tensor]]:
        make_ffn = cpu_experts.CPU_KERNELS[kernel].ffn

        def make_counting_ffn(w13: Tensor, w2: Tensor) -> Callable[..., Tensor]:
            def ffn(inputs: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
                rows.append(experts.numel())
                return make_ffn(w13, w2)(inputs, experts, weights)

            return ffn

        return make_counting_ffn

    directory = checkpoint_of(case)
    prompt = case.prompts(1, 50)[0]
    with serving(directory) as engine:
        for kernel, implementation in cpu_experts.CPU_KERNELS.items():
            monkeypatch.setitem(cpu_experts.CPU_KERNELS, kernel, implementation._replace(ffn=counting(kernel)))
        engine.greedy([prompt], 1)
    assert sum(rows) == sum(ffn_slots(directory, prompt))


def ffn_slots(directory: Path, prompt: list[int]) -> list[int]:
    """By layer, how many slots of the prompt the reference gives to FFN experts."""
    model, slots = LongcatForCausalLM.from_checkpoint(directory), []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda _module, _inputs, routing: slots.append(int((routing.ids >= 0).sum())))
    with torch.no_grad():
        model(torch.tensor([prompt]))
    return slots


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
    """Against `longcat_core.experts.moe` in fp64: the sum of the shares of ranks that have the experts between them."""
    from longcat_vllm.cpu_experts import CPU_KERNELS

    x, w13, w2, routing = layer
    pack = CPU_KERNELS[kernel].pack
    total = torch.zeros(x.shape, dtype=torch.float64)
    for mine in torch.arange(w13.shape[0]).tensor_split(ranks):
        expert_map = torch.full((w13.shape[0],), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(mine.numel(), dtype=torch.int32)
        total += torch.ops.longcat.cpu_experts(
            x, routing.ids, routing.weights, pack(w13[mine]), pack(w2[mine]), expert_map, kernel
        ).double()
    truth = moe(x.double(), routing, w13.double(), w2.double())
    if routing.ids.max() < 0:
        assert not total.any()
    else:
        assert relative_error(total, truth) < (2e-2 if x.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("kernel", ["bf16_dot", "vector", "torch"])
@pytest.mark.parametrize("ranks", [1, 2])
@settings(max_examples=25, deadline=None)
@given(layer=layers())
def test_every_cpu_kernel_is_the_reference(
    kernel: str, ranks: int, layer: tuple[Tensor, Tensor, Tensor, Routing]
) -> None:
    from longcat_vllm.cpu_experts import select_cpu_kernel

    dtype = torch.bfloat16 if kernel == "bf16_dot" else torch.float32
    if kernel == "bf16_dot" and select_cpu_kernel(32, 32, dtype) != kernel:
        pytest.skip("this CPU has neither AVX512-BF16 nor AMX")
    *tensors, routing = layer
    x, w13, w2 = (tensor.to(dtype) for tensor in tensors)
    assert_kernel_is_reference(kernel, min(ranks, w13.shape[0]), (x, w13, w2, routing))
