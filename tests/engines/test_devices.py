"""The devices of each engine package, made on this machine: what can be known of each without having it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from longcat_core.kernels.cpu import library
from longcat_core.plugin import methods
from longcat_core.weights.plan import load_plan
from longcat_nano import CHECKPOINT
from tests.cases import DEFAULT
from tests.harness import engine

MODEL: Any = import_module(f"{engine.PACKAGE}.model")
BASE: Any = import_module(f"{engine.PACKAGE}.devices.base")
DEVICES = {
    name: getattr(import_module(f"{engine.PACKAGE}.devices.{name.lower()}.device"), name)() for name in ("Cpu", "Cuda")
}


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_can_be_made_on_any_machine(name: str) -> None:
    assert isinstance(DEVICES[name], BASE.Device)
    assert not vars(DEVICES[name])


def test_the_current_device_is_this_machines() -> None:
    devices = import_module(f"{engine.PACKAGE}.devices")
    assert type(devices.current()) is type(DEVICES["Cuda" if torch.cuda.is_available() else "Cpu"])


@pytest.mark.parametrize("name", DEVICES)
def test_doctor_has_something_to_say_of_attention_experts_and_fp8(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "Cuda" and engine.NAME == "vLLM":  # which asks vLLM what it would choose on the machine that it is on
        monkeypatch.setattr("longcat_vllm.devices.cuda.device.engine_choice", lambda *_: ("MLA", "TrtLlmExperts"))
    arguments = (None,) if engine.NAME == "vLLM" else ()
    findings = DEVICES[name].implementations(*arguments)
    cores = ["products", "cores"] if name == "Cpu" else []
    assert [finding.subject for finding in findings] == ["attention", "MoE", "FP8", *cores]
    assert not any(finding.problem for finding in findings)


def test_packed_modules_are_named_in_the_order_in_which_tensors_are_packed() -> None:
    """An engine goes by the order where it applies an adapter, or a quantisation, to one of two projections."""
    packed: dict[str, dict[int, str]] = {}
    for name, target in load_plan(DEFAULT, MODEL.LAYOUT).items():
        if target.part is not None:
            projection, module = name.rsplit(".", 2)[1], target.parameter.rsplit(".", 2)[1]
            assert packed.setdefault(module, {}).setdefault(target.part, projection) == projection
    assert {
        module: [parts[0], parts[1]] for module, parts in packed.items()
    } == MODEL.LongcatCausalLM.packed_modules_mapping


def test_a_cpu_gives_an_engines_layers_cores_products_and_leaves_other_methods_alone() -> None:
    methods = import_module(f"{engine.PACKAGE}.devices.cpu.linear").METHODS
    assert {theirs.__name__ for theirs in methods} >= {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"}
    for theirs, ours in methods.items():
        assert issubclass(ours, theirs)
        model: Any = torch.nn.Sequential(torch.nn.Module(), torch.nn.Module(), torch.nn.Module())
        model[0].quant_method = theirs.__new__(theirs)
        model[0].quant_method.made_with = theirs
        model[1].quant_method = object.__new__(type("Other", (theirs,), {}))
        DEVICES["Cpu"].choose_kernels(model)
        assert type(model[0].quant_method) is ours
        assert model[0].quant_method.made_with is theirs
        assert type(model[1].quant_method).__name__ == "Other"


def _building() -> AbstractContextManager[Any]:
    """What an engine needs to make a layer."""
    if engine.NAME != "vLLM":
        return nullcontext()
    config = import_module("vllm.config")
    return config.set_current_vllm_config(config.VllmConfig())  # type: ignore[no-any-return]


NORMS = {"vLLM": "vllm.model_executor.layers", "SGLang": "sglang.srt.layers"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_norms_as_the_engine_and_by_core_in_bf16(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    norm: Any = import_module(f"{NORMS[engine.NAME]}.layernorm").RMSNorm
    with _building():
        model: Any = torch.nn.Sequential(norm(8), norm(8), type("Other", (norm,), {})(8))
        model.to(dtype)
        DEVICES["Cpu"].choose_kernels(model[::2])
        ours, theirs, _ = model
        x, residual = torch.randn(2, 3, 8).to(dtype)
        torch.testing.assert_close(ours(x), theirs(x))
        for found, wanted in zip(ours(x.clone(), residual.clone()), theirs(x, residual), strict=True):
            torch.testing.assert_close(found, wanted)
        monkeypatch.setattr(methods, "rms_norm", lambda *_: "core's")
        by_core = [name for name, each in zip("abc", model, strict=True) if isinstance(each(x), str)]
        assert by_core == (["a"] if dtype == torch.bfloat16 and library.is_available() else [])


KERNELS = tuple(f"longcat_{name}" for name in ("rms_norm", "rotate", "write_latents", "half_layer", "draft", "route"))
"""Of a prompt, of a decode step, in which half of a layer is one call, and of a draft."""


def _note_kernels(noted: Path, patch: pytest.MonkeyPatch) -> None:
    """The models that ask for kernels, and the kernels that are called."""
    device = type(import_module(f"{engine.PACKAGE}.devices").current())
    choose = device.choose_kernels

    def note(name: str) -> None:
        with noted.open("a") as names:
            names.write(f"{name}\n")

    def noting_model(this: Any, model: Any, **kwargs: Any) -> None:
        note(type(model).__name__)
        choose(this, model, **kwargs)

    def noting(name: str, kernel: Any) -> Any:
        def call(*args: Any) -> Any:
            note(name)
            return kernel(*args)

        return call

    patch.setattr(device, "choose_kernels", noting_model)
    for name in KERNELS if library.is_available() else ():
        patch.setattr(library.library(), name, noting(name, getattr(library.library(), name)))


def test_target_and_drafter_get_their_kernels_from_the_device(tmp_path: Path) -> None:
    noted = tmp_path / "noted"
    with engine.serving(CHECKPOINT, dtype="bfloat16", draft_tokens=1, broken=partial(_note_kernels, noted)) as served:
        assert served.greedy([list(range(5, 45))], 2)
    names = noted.read_text().split()
    models = [name for name in names if name not in KERNELS]
    assert sorted(models) == ["LongcatFlashForCausalLM", "LongcatFlashMTP"]
    if library.is_available():
        assert set(names) >= set(KERNELS)
