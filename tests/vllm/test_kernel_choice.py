"""Off the CPU, experts get a kernel of vLLM's that skips zero experts, whichever vLLM would have chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cases import Case
from tests.engines.test_bad_checkpoints import CASE, refusal
from tests.vllm.engine import configure

KERNELS = [
    *("TritonExperts", "FlashInferExperts", "TrtLlmBf16ExpertsMonolithic", "TrtLlmBf16ExpertsModular", "AiterExperts"),
    *("BatchedTritonExperts", "MoonEPExperts", "XPUExperts", "TrtLlmBf16LoRAExperts"),
]
"""Those that vLLM 0.32 has for unquantised experts, without a CPU's."""


@pytest.fixture
def chosen_by_vllm(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, str | None], Callable[[], Any]]:
    """A container of experts off the CPU, whose kernel vLLM chooses: one of its own accord, one if asked for Triton."""
    from vllm.model_executor.layers.fused_moe import routed_experts
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

    from longcat_vllm import devices
    from longcat_vllm.devices.cuda.device import Cuda
    from longcat_vllm.moe import ZeroExpertAwareExperts

    def choosing(left_alone: str | None, asked_for_triton: str | None) -> Callable[[], Any]:
        class Method(FusedMoEMethodBase):
            def __init__(self, moe_config: Any) -> None:
                assert not moe_config.is_lora_enabled
                name = asked_for_triton if moe_config.moe_backend == "triton" else left_alone
                self.experts_cls = type(name, (), {}) if name is not None else None

        Method.__abstractmethods__ = frozenset[str]()
        monkeypatch.setattr(devices, "current", Cuda)
        monkeypatch.setattr(routed_experts, "UnquantizedFusedMoEMethod", Method)
        moe_config = SimpleNamespace(moe_backend="auto", is_lora_enabled=True)
        experts = ZeroExpertAwareExperts.__new__(ZeroExpertAwareExperts)
        return lambda: ZeroExpertAwareExperts._get_quant_method(experts, "experts", None, moe_config)

    return choosing


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    logger = logging.getLogger("vllm.longcat_vllm.devices.cuda.experts")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield lambda: caplog.text
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("kernel", [*KERNELS, None])
def test_a_kernel_that_is_not_known_to_skip_zero_experts_is_not_taken(
    kernel: str | None, chosen_by_vllm: Callable[[str | None, str | None], Callable[[], Any]], said: Callable[[], str]
) -> None:
    from longcat_vllm.devices.cuda.experts import SKIP_ZERO_EXPERTS, kernel_of

    taken = kernel_of(chosen_by_vllm(kernel, "TritonExperts")())
    if kernel in SKIP_ZERO_EXPERTS:
        assert taken == kernel
        assert said() == ""
    else:
        assert taken == "TritonExperts"
        assert f"TritonExperts instead of vLLM's choice, {kernel or 'Method'}, which is not known" in said()


@pytest.mark.parametrize("kernel", ["BatchedTritonExperts", None])
def test_where_there_is_no_such_kernel_the_advice_helps(
    kernel: str | None, chosen_by_vllm: Callable[[str | None, str | None], Callable[[], Any]]
) -> None:
    with pytest.raises(ValueError, match="leave --all2all-backend out"):
        chosen_by_vllm(kernel, kernel)()


def test_these_are_all_the_kernels_that_vllm_has_for_unquantised_experts() -> None:
    """If this fails, read what the new one does with an id of -1."""
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    found = {"TrtLlmBf16LoRAExperts"}  # which `select_unquantized_moe_backend` names itself
    for backend in unquantized.UnquantizedMoeBackend:
        if backend.name not in ("CPU", "TPU", "OOT"):
            found |= {kernel.__name__ for kernel in unquantized.backend_to_kernel_cls(backend)}
    assert found == set(KERNELS)


def test_a_kernel_that_was_asked_for_and_is_not_known_to_skip_zero_experts_is_refused(
    checkpoint_of: Callable[[Case], Path],
) -> None:
    from typing import get_args

    from vllm.config.kernel import MoEBackend

    from longcat_vllm.deployment import MOE_BACKENDS

    directory = checkpoint_of(CASE)
    for backend in ("batched_triton", "flashinfer_trtllm", "aiter"):  # of those that vLLM has for unquantised experts
        assert backend in get_args(MoEBackend)
        assert f"moe_backend: '{backend}', wanted one of auto, triton" in refusal(directory, moe_backend=backend)
    for backend in MOE_BACKENDS:
        assert configure(directory, moe_backend=backend) == CASE.config


@pytest.mark.parametrize("backend", ["deepep_low_latency", "nixl_ep", "moonep"])
def test_a_transport_without_such_a_kernel_is_refused_where_it_would_be_used(
    backend: str,
) -> None:
    from longcat_vllm.deployment import _unsupported_parallelism

    parallel = SimpleNamespace(
        all2all_backend=backend,
        data_parallel_size=2,
        enable_expert_parallel=True,
        enable_eplb=False,
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
    )
    (problem,) = _unsupported_parallelism(parallel)
    assert f"all2all_backend: {backend!r}, wanted" in problem
    assert "leave --all2all-backend out" in problem
    for change in ({"data_parallel_size": 1}, {"enable_expert_parallel": False}):
        assert _unsupported_parallelism(SimpleNamespace(**vars(parallel) | change)) == []
