"""Off the CPU, experts get a kernel of vLLM's that skips zero experts, whichever vLLM would have chosen."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longcat_core import spellings
from longcat_core.quantization import Quantization
from longcat_vllm.devices.base import MOE_BACKENDS
from longcat_vllm.devices.cpu.device import Cpu
from longcat_vllm.devices.cuda.device import TRANSPORTS, Cuda
from tests.cases import Case
from tests.engines.test_bad_checkpoints import CASE, refusal
from tests.vllm.engine import configure

KERNELS = [
    *("TritonExperts", "FlashInferExperts", "TrtLlmBf16ExpertsMonolithic", "TrtLlmBf16ExpertsModular", "AiterExperts"),
    *("BatchedTritonExperts", "MoonEPExperts", "XPUExperts", "TrtLlmBf16LoRAExperts"),
]
"""Those that vLLM 0.32 has for unquantised experts, without a CPU's."""
FP8_KERNELS = [
    *("TritonExperts", "FlashInferExperts", "TritonOrDeepGemmExperts", "AiterExperts", "BatchedDeepGemmExperts"),
    *("BatchedHummingGroupedExperts", "HummingGroupedExperts", "HummingIndexedExperts", "MarlinExperts"),
    *("BatchedTritonExperts", "TritonOrCutlassExperts", "CutlassBatchedExpertsFp8", "HPCExperts"),
    *("TrtLlmFp8ExpertsMonolithic", "TrtLlmFp8ExpertsModular"),
    *("XPUExpertsFp8", "XPUExpertsMxFp8", "XPUExpertsBlockFp8"),
]
"""Those for experts in FP8."""


@pytest.fixture
def chosen_by_vllm(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, str | None], Callable[[], Any]]:
    """A container of experts off the CPU, whose kernel vLLM chooses: one of its own accord, one if asked for Triton."""
    from vllm.model_executor.layers.fused_moe import routed_experts
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

    from longcat_vllm import devices
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


@pytest.mark.parametrize("kernel", [*dict.fromkeys([*KERNELS, *FP8_KERNELS]), None])
def test_a_kernel_that_is_not_known_to_skip_zero_experts_is_not_taken(
    kernel: str | None, chosen_by_vllm: Callable[[str | None, str | None], Callable[[], Any]], said: Callable[[], str]
) -> None:
    from longcat_vllm.devices.cuda.experts import SKIP_ZERO_EXPERTS, kernel_of

    taken = kernel_of(chosen_by_vllm(kernel, "TritonExperts")())
    assert set(SKIP_ZERO_EXPERTS) == {"TritonExperts", "FlashInferExperts", "TritonOrDeepGemmExperts"}, "those read"
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


def asked(**changes: Any) -> Any:
    """What a GPU's device looks at of vLLM's configuration."""
    plain = {
        "quantization": None,
        "hf_config": None,
        "convert_type": "none",
        "moe_backend": "auto",
        "all2all_backend": "allgather_reducescatter",
        "data_parallel_size": 2,
        "prefill_context_parallel_size": 1,
        "enable_expert_parallel": True,
    }
    together = SimpleNamespace(**plain | changes)
    return SimpleNamespace(model_config=together, parallel_config=together, kernel_config=together)


def test_these_are_all_the_kernels_that_vllm_has_for_experts_in_fp8() -> None:
    """If this fails, read what the new one does with an id of -1."""
    from vllm.model_executor.layers.fused_moe.oracle import fp8

    found = set()
    for backend in fp8.Fp8MoeBackend:
        if not backend.name.startswith(("CPU", "NONE", "EMULATION", "TRITON_MXFP8", "AITER_MXFP8")):
            found |= {kernel.__name__ for kernel in fp8.backend_to_kernel_cls(backend)}
    assert found == set(FP8_KERNELS)


@pytest.mark.parametrize("backend", ["deep_gemm", "humming"])
def test_kernels_that_were_asked_for_experts_in_fp8(backend: str) -> None:
    """DeepGEMM's skip zero experts; Humming's of FP8 were not read."""
    fp8 = replace(CASE.config, quantization=Quantization("fp8"))
    in_fp8 = asked(moe_backend=backend, quantization="fp8", hf_config=spellings.published(fp8))
    reasons = Cuda().reasons_for_own_class(in_fp8)
    assert [reason.partition(" is not")[0] for reason in reasons] == ["moe_backend 'humming'"] * (backend == "humming")


@pytest.mark.parametrize(
    ("quantization", "method", "wanted"),
    [
        (Quantization("fp8"), "fp8", ""),
        (Quantization("fp8", block=(64, 64)), "fp8", "quantization_config.weight_block_size: [64, 64], wanted [128"),
        (Quantization("fp8", fmt="e5m2"), "fp8", "quantization_config.fmt: 'e5m2'"),
        (Quantization("fp8"), "humming", "quantization: 'humming', wanted none"),
        (None, "fp8_per_tensor", "quantization: 'fp8_per_tensor', wanted none"),
    ],
)
def test_a_quantisation_that_this_package_does_not_serve_is_left_to_vllms_own_class(
    quantization: Quantization | None, method: str, wanted: str
) -> None:
    hf_config = spellings.published(replace(CASE.config, quantization=quantization))
    reasons = Cuda().reasons_for_own_class(asked(quantization=method, hf_config=hf_config))
    assert len(reasons) == bool(wanted)
    assert all(reason.startswith(wanted) for reason in reasons)


@pytest.mark.parametrize("backend", ["batched_triton", "flashinfer_trtllm", "aiter", *MOE_BACKENDS])
def test_a_kernel_that_was_asked_for_and_is_not_known_to_skip_zero_experts(
    backend: str, checkpoint_of: Callable[[Case], Path]
) -> None:
    """On a GPU it is served by vLLM's own class, and refused on a CPU, where that one does not run."""
    from typing import get_args

    from vllm.config.kernel import MoEBackend

    assert backend in get_args(MoEBackend)
    directory, reasons = checkpoint_of(CASE), Cuda().reasons_for_own_class(asked(moe_backend=backend))
    if backend in MOE_BACKENDS:
        assert configure(directory, moe_backend=backend) == CASE.config
        assert reasons == []
    else:
        assert f"moe_backend: '{backend}', wanted one of auto, triton" in refusal(directory, moe_backend=backend)
        (reason,) = reasons
        assert reason.startswith(f"moe_backend '{backend}' is not known to skip zero experts")


@pytest.mark.parametrize("where", [{}, {"data_parallel_size": 1}, {"enable_expert_parallel": False}])
def test_every_transport_is_served_refused_or_left_to_vllms_own_class_before_any_worker_starts(
    where: dict[str, Any],
) -> None:
    """Where it would be used. If this fails for a new one, read what it does with an id of -1."""
    from typing import get_args

    from vllm.config.parallel import All2AllBackend

    from longcat_vllm.deployment import _unsupported_parallelism

    transports = set(get_args(All2AllBackend)) - {"naive", "pplx"}  # for which vLLM takes its default
    assert transports > {*TRANSPORTS, "deepep_low_latency"}
    for transport in transports:
        given = asked(all2all_backend=transport, **where)
        problems, reasons = _unsupported_parallelism(given.parallel_config), Cuda().reasons_for_own_class(given)
        assert bool(problems) is (transport == "deepep_low_latency" and not where)
        assert bool(reasons) is (transport not in (*TRANSPORTS, "deepep_low_latency") and not where)
        assert all(f"'{transport}'" in text for text in (*problems, *reasons))


def test_vllm_still_takes_its_default_for_transports_that_it_no_longer_has(
    checkpoint_of: Callable[[Case], Path],
) -> None:
    """If this fails, the test above has to look at them as well."""
    from vllm.engine.arg_utils import EngineArgs

    for transport in ("naive", "pplx"):
        arguments = EngineArgs(str(checkpoint_of(CASE)), skip_tokenizer_init=True, all2all_backend=transport)
        assert arguments.create_engine_config().parallel_config.all2all_backend == "allgather_reducescatter"


def test_on_a_platform_of_another_plugin_vllms_own_class_serves() -> None:
    from longcat_vllm.devices.unknown import Unknown

    assert Unknown("npu").reasons_for_own_class(asked()) == ["longcat-serving does not know the platform 'npu'"]
    (finding,) = Unknown("npu").implementations(None)
    assert finding.value == "vLLM's own class, as longcat-serving does not know the platform 'npu'"


def test_on_gpus_of_amd_vllms_own_class_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first choice of experts there is AITER's, which is not known to skip zero experts."""
    from vllm import platforms
    from vllm.platforms.interface import Platform, PlatformEnum

    from longcat_vllm import devices
    from longcat_vllm.devices.unknown import Unknown

    rocm = type("Rocm", (Platform,), {"_enum": PlatformEnum.ROCM, "device_name": "rocm", "device_type": "cuda"})
    monkeypatch.setattr(platforms, "_current_platform", rocm())
    assert type(devices.current()) is Unknown
    assert devices.current().reasons_for_own_class(asked()) == ["longcat-serving does not know the platform 'rocm'"]
    monkeypatch.setattr(rocm, "_enum", PlatformEnum.CUDA)
    assert type(devices.current()) is Cuda


@pytest.mark.parametrize("asks_for_gate", [False, True])
def test_a_gate_that_the_own_class_does_not_have_is_not_lost_without_a_word(
    asks_for_gate: bool,
    checkpoint_of: Callable[[Case], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Cpu, "reasons_for_own_class", lambda *_: ["it is quantised"])
    arguments = {"additional_config": {"longcat": {"draft_gate": asks_for_gate}}}
    if asks_for_gate:
        message = refusal(checkpoint_of(CASE), **arguments)
        assert "vLLM's own class, which serves here as it is quantised, does not have it; leave it out" in message
    else:
        with caplog.at_level("WARNING"):
            configure(checkpoint_of(CASE), **arguments)
        assert "LongCat-Flash is served by vLLM's own class: it is quantised." in caplog.text


# -- our kernels, on request -------------------------------------------------------------------------

REQUESTED = {"longcat": {"kernels": True}}


def test_kernels_that_were_asked_for_are_refused_on_a_cpu(checkpoint_of: Callable[[Case], Path]) -> None:
    message = refusal(checkpoint_of(CASE), additional_config=REQUESTED)
    assert """{"kernels": true}}': they are for NVIDIA GPUs, and this is a CPU; or leave the kernels out""" in message


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ""),
        ({"moe_backend": "triton"}, ""),
        ({"moe_backend": "flashinfer_cutlass"}, "moe_backend is 'flashinfer_cutlass', which is another kernel"),
        ({"all2all_backend": "deepep_high_throughput"}, "all2all_backend is 'deepep_high_throughput', wanted 'allga"),
        ({"all2all_backend": "deepep_high_throughput", "data_parallel_size": 1}, ""),
        ({"dtype": torch.float16}, "dtype torch.float16, wanted"),
        ({"capability": (8, 0)}, "compute capability 8.0, wanted"),
        ({"VLLM_BATCH_INVARIANT": True}, "VLLM_BATCH_INVARIANT is set"),
        ({"tensor_parallel_size": 2}, ""),
        ({"tensor_parallel_size": 2, "enable_expert_parallel": False}, "64 rows of an FP8 expert on a rank, wanted"),
    ],
    ids=str,
)
def test_kernels_that_were_asked_for_and_cannot_be_used_on_a_gpu(
    changes: dict[str, Any], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts in FP8 have 256 rows of two ranks of data parallelism, unless they are not split."""
    from vllm import envs

    from longcat_vllm.devices.cuda import device

    envs.disable_envs_cache()
    monkeypatch.setattr(device, "capability", lambda: changes.get("capability", (9, 0)))
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", str(int("VLLM_BATCH_INVARIANT" in changes)))
    fp8 = replace(CASE.config, expert_ffn_hidden_size=256, quantization=Quantization("fp8"))
    plain = {"dtype": torch.bfloat16, "tensor_parallel_size": 1, "hf_config": spellings.published(fp8)}
    obstacles = Cuda().obstacles_to_kernels(asked(**{**plain, **changes}))
    assert len(obstacles) == bool(wanted)
    assert all(obstacle.startswith(wanted) for obstacle in obstacles)


def test_experts_that_our_kernels_do_not_take_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """If `deployment.check` has missed them."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

    from longcat_vllm.devices.cuda.kernels import with_our_kernels

    method = SimpleNamespace(moe_block_shape=[64, 64])
    moe_config: Any = SimpleNamespace(
        moe_backend="auto",
        is_act_and_mul=True,
        activation=None,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
    )
    with pytest.raises(ValueError, match=r"kernels cannot compute these experts: .*; leave the kernels out"):
        with_our_kernels(lambda: method, moe_config)
    assert not hasattr(method, "experts_cls")
