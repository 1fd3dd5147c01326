"""FP8 in vLLM: what stays in FP8 on a CPU and on a GPU, and what vLLM's own class would make of the same files."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longcat_core import spellings
from longcat_core.quantization import Quantization
from longcat_core.weights.blocks import dequantize_blocks, quantize_blocks
from longcat_core.weights.precision import Precision
from longcat_vllm import devices
from longcat_vllm.devices.cpu import fp8
from longcat_vllm.devices.cpu.fp8 import CpuFp8Kernels, error_of_kernels
from longcat_vllm.devices.cuda.device import Cuda
from longcat_vllm.model import PACKED
from longcat_vllm.quantization import LongcatFp8Config
from tests.cases import CHAT, drafting_tensors, published, write_checkpoint
from tests.engines.test_fp8 import PROMPT, Truth
from tests.fp8 import CONFIG, released
from tests.vllm import fp8_kernels
from tests.vllm.engine import serving

NAMES = ("q_a_proj", "kv_a_proj_with_mqa")
LAYER = "model.layers.0"
FP8 = torch.float8_e4m3fn


# -- a CPU with kernels ------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["core's", "vLLM's"])
def test_with_kernels_weights_stay_in_fp8(kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = fp8_kernels.install(monkeypatch) if kernels == "vLLM's" else []
    monkeypatch.setattr(fp8, "multiplies_bf16", lambda: kernels == "vLLM's")
    tensors = released(CONFIG, published(CONFIG))
    truth = Truth(tensors, (128, 128), tmp_path / "bf16")
    write_checkpoint(tmp_path / "fp8", CONFIG, tensors)
    with serving(tmp_path / "fp8", dtype="bfloat16") as served:
        truth.check(served)
        dtypes = {name: parameter.dtype for name, parameter in served.model.named_parameters()}
        used = {module.fp8_kernel for module in served.model.modules() if hasattr(module, "fp8_kernel")}
    layer = {name.removeprefix(f"{LAYER}."): dtype for name, dtype in dtypes.items() if name.startswith(LAYER)}
    linear = {name for name in layer if "proj.weight" in name and not name.endswith("_scale_inv")}
    in_fp8 = {name for name in linear if layer[name] == FP8}
    assert linear - in_fp8 == {"self_attn.0.kv_b_proj.weight", "self_attn.1.kv_b_proj.weight"}, "absorbed in bf16"
    assert layer["mlp.experts.routed_experts.w13_weight"] == layer["mlp.experts.routed_experts.w2_weight"] == FP8
    assert layer["mlp.router.classifier.weight"] == torch.float32
    stand_ins = {"fp8_scaled_mm_cpu", "fused_experts_cpu"}
    assert set(called) in (set(), stand_ins), "the real kernels, or both of the tests'"
    assert used == {"vllm" if kernels == "vLLM's" else "compiled"}


def test_with_kernels_the_drafts_layer_is_in_fp8_as_its_tensors_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp8_kernels.install(monkeypatch)
    for kept, disabled in ((True, ()), (False, ("mtp",))):
        config = replace(CONFIG, quantization=Quantization("fp8", disabled=disabled))
        directory = write_checkpoint(tmp_path / str(kept), config, released(config, drafting_tensors(config)))
        with serving(directory, dtype="bfloat16", draft_tokens=2) as served:
            answers = served.speculated([PROMPT[:40]], 24)
            runner = served.llm.llm_engine.model_executor.driver_worker.worker.model_runner
            eh_proj = runner.drafter.model.model.layers[0].eh_proj
            assert (eh_proj.weight.dtype == FP8) is kept
        assert sum(answers[0].accepted) > 0


@pytest.mark.parametrize(
    ("dtype", "projections", "rows", "is_taken"),
    [
        (torch.bfloat16, NAMES, (128, 96), True),
        (torch.bfloat16, NAMES, (128, 80), False),  # 208 rows: the kernel would end the process
        (torch.bfloat16, ("o_proj",), (128,), True),
        (torch.bfloat16, ("kv_b_proj",), (384,), False),
        (torch.float32, NAMES, (128, 96), False),
        (torch.float16, NAMES, (128, 96), False),
    ],
)
def test_a_cpus_kernels_take_what_they_compute(
    dtype: torch.dtype, projections: Any, rows: Any, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp8_kernels.install(monkeypatch)
    fp8_kernels.remove_cores(monkeypatch)
    assert CpuFp8Kernels(dtype).take_linear(projections, rows, 128) is is_taken
    assert CpuFp8Kernels(dtype).take_experts(256, 128) is (dtype == torch.bfloat16)
    assert not CpuFp8Kernels(dtype).take_experts(192, 128), "the up projection's scales begin in the middle of a block"


def test_cores_kernels_take_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace())
    kernels = CpuFp8Kernels(torch.bfloat16)
    assert kernels.take_linear(NAMES, (128, 83), 100)
    assert kernels.take_experts(256, 100)
    assert not kernels.take_experts(192, 128)
    assert not kernels.take_linear(("kv_b_proj",), (384,), 128)
    assert not CpuFp8Kernels(torch.float32).take_linear(NAMES, (128, 96), 128)


def test_without_kernels_nothing_stays_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8_kernels.remove_cores(monkeypatch)
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace())
    assert not CpuFp8Kernels(torch.bfloat16).take_linear(NAMES, (128, 96), 128)
    assert not CpuFp8Kernels(torch.bfloat16).take_experts(256, 128)


# -- a GPU -------------------------------------------------------------------------------------------


def of_gpu(quantization: Quantization, monkeypatch: pytest.MonkeyPatch, ranks: int = 8, **drafter: Any) -> Any:
    """vLLM's methods for layers of LongCat-Flash-Chat on a rank of a GPU."""
    monkeypatch.setattr(devices, "current", Cuda)
    monkeypatch.setattr("longcat_vllm.quantization.get_tensor_model_parallel_world_size", lambda: ranks)
    chat = replace(spellings.read(CHAT), quantization=quantization)
    config = LongcatFp8Config(Precision(chat, PACKED, Cuda().fp8_kernels(torch.bfloat16), **drafter))
    return lambda module: type(method_of(config, module)).__name__


def method_of(config: Any, module: str) -> Any:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.linear import LinearBase

    vllm_config = VllmConfig()
    vllm_config.model_config = SimpleNamespace(dtype=torch.bfloat16)  # type: ignore[assignment]
    with set_current_vllm_config(vllm_config):
        return config.get_quant_method(LinearBase.__new__(LinearBase), module)


LINEAR = [
    *(f"self_attn.1.{name}" for name in ("fused_qkv_a_proj", "q_b_proj", "kv_b_proj", "o_proj")),
    *("mlps.0.gate_up_proj", "mlps.0.down_proj"),
]


@pytest.mark.parametrize("ranks", [1, 8])
def test_a_gpu_has_vllms_own_fp8_for_all_of_chat(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    method = of_gpu(Quantization("fp8"), monkeypatch, ranks)
    assert {module: method(f"{LAYER}.{module}") for module in LINEAR} == dict.fromkeys(LINEAR, "Fp8LinearMethod")


def test_an_ignored_half_of_a_fused_layer_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ignored = tuple(f"{LAYER}.self_attn.1.{name}" for name in NAMES)
    method = of_gpu(Quantization("fp8", ignored=ignored), monkeypatch)
    assert method(f"{LAYER}.self_attn.1.fused_qkv_a_proj") == "UnquantizedLinearMethod"
    assert method(f"{LAYER}.self_attn.0.fused_qkv_a_proj") == "Fp8LinearMethod"


def test_vllms_own_class_reads_an_ignored_half_as_fp8() -> None:
    """Which casts its bf16 numbers to FP8, without scales. If this fails, vLLM is mended: docs/upstream.md."""
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config
    from vllm.model_executor.models.longcat_flash import LongcatFlashForCausalLM

    ignored = [f"{LAYER}.self_attn.1.{name}" for name in NAMES]
    config = Fp8Config(True, "dynamic", ignored, [128, 128])
    config.packed_modules_mapping = LongcatFlashForCausalLM.packed_modules_mapping
    assert type(method_of(config, f"{LAYER}.self_attn.1.fused_qkv_a_proj")).__name__ == "Fp8LinearMethod"


def test_the_mtp_layer_has_what_its_tensors_have(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = "model.layers.56"
    in_fp8 = {"model.mtp.layers.0.self_attn.o_proj.weight", "model.mtp.layers.0.eh_proj.weight"}
    method = of_gpu(Quantization("fp8", disabled=("mtp",)), monkeypatch, drafter=(layer, in_fp8))
    assert method(f"{layer}.self_attn.o_proj") == method(f"{layer}.eh_proj") == "Fp8LinearMethod"
    assert method(f"{layer}.self_attn.q_b_proj") == "UnquantizedLinearMethod"


def test_vllms_own_class_reads_an_ignored_mtp_layer_as_fp8() -> None:
    """By its own name of the layer. If this fails, vLLM is mended: docs/upstream.md."""
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    config = Fp8Config(True, "dynamic", ["model.mtp.layers.0.self_attn.o_proj"], [128, 128])
    assert type(method_of(config, "model.layers.56.mtp_block.self_attn.o_proj")).__name__ == "Fp8LinearMethod"


@pytest.mark.parametrize(("heads", "is_taken"), [(64, True), (3, False)])
def test_absorbed_weights_are_in_fp8_where_vllm_can_read_them(heads: int, is_taken: bool) -> None:
    assert Cuda().fp8_kernels(torch.bfloat16).take_linear(("kv_b_proj",), (heads * 64,), 512) is is_taken


# -- numbers that a CPU's kernels read wrongly -------------------------------------------------------


def far_apart(shape: tuple[int, int] = (256, 128)) -> torch.Tensor:
    """A number of 20,000 times the others' size, which leaves them none but the smallest numbers of FP8."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[3, 5] = 2e4
    return weight


def test_the_error_of_a_cpus_kernels_is_known_before_they_are_used() -> None:
    """The kernels read 0 as 2^-7, and so on (docs/upstream.md); here is what that makes of each row."""
    for weight in (far_apart(), far_apart((250, 200)), torch.randn(256, 128)):
        numbers, scales = quantize_blocks(weight)
        exact = dequantize_blocks(numbers, scales)
        codes = numbers.float()
        read = torch.where(codes.abs() < 2**-6, codes.sign() * (2**-7 + codes.abs() / 2), codes)
        read = torch.where(codes == 0, 2.0**-7, read)
        wrong = dequantize_blocks(numbers, scales) * torch.where(codes == 0, 0.0, read / codes) + torch.where(
            codes == 0, 2.0**-7 * dequantize_blocks(torch.ones_like(codes).to(FP8), scales), 0.0
        )
        error = float(((wrong - exact).norm(dim=1) / exact.norm(dim=1)).max())
        assert error <= error_of_kernels(numbers, scales) <= 4 * error + 1e-5


@pytest.mark.parametrize("has_cores", [True, False])
@pytest.mark.parametrize("name", ["mlps.0.down_proj", "mlp.experts.3.up_proj"])
def test_a_weight_that_vllms_kernels_read_wrongly_is_left_to_cores_or_dequantised(
    name: str, has_cores: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp8_kernels.install(monkeypatch)
    if not has_cores:
        fp8_kernels.remove_cores(monkeypatch)
    weights = published(CONFIG)
    weights[f"{LAYER}.{name}.weight"][:, 1] *= 2e4
    tensors = released(CONFIG, weights)
    truth = Truth(tensors, (128, 128), tmp_path / "bf16")
    write_checkpoint(tmp_path / "fp8", CONFIG, tensors)
    with serving(tmp_path / "fp8", dtype="bfloat16") as served:
        truth.check(served)
        layer = served.model.model.layers[0]
        experts = layer.mlp.experts.routed_experts
        found = {
            "mlps": (layer.mlps[0].down_proj.fp8_kernel, layer.mlps[0].down_proj.weight.dtype),
            "mlp": (experts.cpu_kernel, experts.w13_weight.dtype),
        }
    wrong, right = ("mlps", "mlp") if "mlps" in name else ("mlp", "mlps")
    assert found[right] == ("vllm" if right == "mlps" else "fp8", FP8)
    if has_cores:
        assert found[wrong] == ("compiled", FP8)
    else:
        assert found[wrong][1] == torch.bfloat16
