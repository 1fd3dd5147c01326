"""The devices of each engine package, made on this machine: what can be known of each without having it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

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
        DEVICES["Cpu"].choose_products(model)
        assert type(model[0].quant_method) is ours
        assert model[0].quant_method.made_with is theirs
        assert type(model[1].quant_method).__name__ == "Other"


def _note_models(noted: Path, patch: pytest.MonkeyPatch) -> None:
    device = type(import_module(f"{engine.PACKAGE}.devices").current())
    choose = device.choose_products

    def note(this: Any, model: Any) -> None:
        with noted.open("a") as names:
            names.write(f"{type(model).__name__}\n")
        choose(this, model)

    patch.setattr(device, "choose_products", note)


def test_target_and_drafter_get_their_products_from_the_device(tmp_path: Path) -> None:
    noted = tmp_path / "noted"
    with engine.serving(CHECKPOINT, dtype="bfloat16", draft_tokens=1, broken=partial(_note_models, noted)) as served:
        assert served.greedy([[5, 6, 7]], 2)
    assert sorted(noted.read_text().split()) == ["LongcatFlashForCausalLM", "LongcatFlashMTP"]
