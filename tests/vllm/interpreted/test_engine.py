"""An engine whose router and experts are core's kernels, by the option that a user types."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longcat_core.reference import LongcatForCausalLM
from longcat_vllm import devices
from longcat_vllm.devices.cpu.device import Cpu
from longcat_vllm.devices.cuda.device import Cuda
from longcat_vllm.devices.cuda.kernels import LongcatExperts
from tests.cases import DEFAULT, Case, write_checkpoint
from tests.oracle import relative_error
from tests.vllm.engine import serving

KERNELS: dict[str, Any] = {"additional_config": {"longcat": {"kernels": True}}}


class CpuWithAGpusMoE(Cpu):
    """Attention is a CPU's, as no GPU's can be interpreted; router and experts are a GPU's."""

    router_functions = Cuda.router_functions
    experts_method = Cuda.experts_method
    expert_map = Cuda.expert_map
    has_packed = Cuda.has_packed

    def obstacles_to_kernels(self, _: Any) -> list[str]:
        return []


def test_logits_are_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    pack = utils.dispatch_cpu_unquantized_gemm  # which on a CPU alone takes the weight away
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", lambda layer, **_: pack(layer, remove_weight=False))
    monkeypatch.setattr(devices, "current", CpuWithAGpusMoE)
    for experts in (TritonExperts, LongcatExperts):
        monkeypatch.setattr(experts, "_supports_current_device", staticmethod(lambda: True))
    case = Case(DEFAULT)
    directory, prompt = write_checkpoint(tmp_path, case.config, case.published()), case.prompts(1, 7)[0]
    with serving(directory, **KERNELS) as served:
        layer = served.model.model.layers[0].mlp
        assert isinstance(layer.experts.routed_experts.quant_method.moe_kernel.fused_experts, LongcatExperts)
        assert layer.route.__module__ == layer.router.product.__module__ == "longcat_core.kernels.operators"
        logits = served.log_softmax(prompt, case.config.vocab_size)
    with torch.no_grad():
        exact, _, _ = LongcatForCausalLM.from_checkpoint(directory)(torch.tensor([prompt]))
    assert relative_error(logits, exact[0, :-1].log_softmax(dim=-1)) < 1e-3
