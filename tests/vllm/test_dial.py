"""Where vLLM's options leave no mean to be held, and how workers turn a dial; `engines/test_dial.py` has the rest."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import dataclasses
import inspect
import pickle
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.forward_context import ForwardContext, set_forward_context
from vllm.v1.core.sched.output import SchedulerOutput

from longcat_core.dial import DialledRouters
from longcat_core.observation import shared_target
from longcat_core.target_by_queue import PATIENCE, PLACES
from longcat_nano import CHECKPOINT
from longcat_vllm import dial, metrics, scheduling
from longcat_vllm.engine import ARCHITECTURE
from tests.cases import CASES, DEFAULT, Case
from tests.dialled import CPU
from tests.vllm.engine import held_at, speculation


@pytest.fixture
def vllm_config(checkpoint_of: Callable[[Case], Path]) -> VllmConfig:
    return EngineArgs(str(checkpoint_of(CASES["default"])), skip_tokenizer_init=True).create_engine_config()


@pytest.mark.parametrize(
    "option", ["data_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"]
)
def test_ranks_with_other_tokens_have_no_dial(
    option: str, vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dial.obstacles(vllm_config, 2.5) == []
    monkeypatch.setattr(vllm_config.parallel_config, option, 2)
    (obstacle,) = dial.obstacles(vllm_config, 2.5)
    assert obstacle.startswith(f"{option} is 2, wanted 1, as ranks with other tokens would turn their dials apart")


def test_microbatches_and_memory_that_comes_and_goes_have_no_dial(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_config.parallel_config, "enable_dbo", True)
    monkeypatch.setattr(vllm_config.model_config, "enable_sleep_mode", True)
    microbatches, sleep = dial.obstacles(vllm_config, 2.5)
    assert microbatches.endswith("leave --enable-dbo out")
    assert sleep.startswith("with enable_sleep_mode")


def test_rows_without_a_cache_are_no_step(vllm_config: VllmConfig) -> None:
    with set_forward_context(None, vllm_config, slot_mapping=None):
        assert metrics.rows_that_are_tokens() is None
    with set_forward_context(None, vllm_config, slot_mapping={"attn": torch.tensor([3, -1])}):
        rows = metrics.rows_that_are_tokens()
    assert rows is not None
    assert rows.tolist() == [1, 0]


def configured(checkpoint: Path, **options: Any) -> VllmConfig:
    return EngineArgs(str(checkpoint), skip_tokenizer_init=True, **options).create_engine_config()


def test_workers_can_turn_a_dial_where_there_is_one(checkpoint_of: Callable[[Case], Path]) -> None:
    checkpoint = checkpoint_of(CASES["default"])
    assert configured(checkpoint).parallel_config.worker_extension_cls == ""
    extension = configured(checkpoint, **held_at(2.5)).parallel_config.worker_extension_cls
    assert pkgutil.resolve_name(extension.replace("dial.", "dial:")) is dial.DialOfWorker
    own = configured(checkpoint, worker_extension_cls="a.b.C", **held_at(2.5)).parallel_config
    assert own.worker_extension_cls == "a.b.C", "a user's own keeps its place"


@pytest.fixture
def worker() -> dial.DialOfWorker:
    """Of a model whose dial is at 2.5."""
    router = SimpleNamespace(e_score_correction_bias=torch.zeros(DEFAULT.num_experts))
    held = SimpleNamespace(dialled=DialledRouters(DEFAULT, 2.5, [router], CPU))
    worker = dial.DialOfWorker()
    worker.get_model = lambda: held
    worker.vllm_config = cast("VllmConfig", SimpleNamespace(**held_at(2.5)))
    return worker


def test_a_worker_turns_its_dial_by_what_can_come_over_http(worker: dial.DialOfWorker) -> None:
    assert worker.set_ffn_experts("3") == {"ffn_experts": 3}
    assert worker.set_ffn_experts(1.5) == {"ffn_experts": 1.5}
    worker.get_model().dialled.dial.settings.fill_(0.5)
    assert worker.reset_dial() == {"ffn_experts": 1.5}
    assert not worker.get_model().dialled.dial.settings.any()


def test_a_worker_that_is_told_what_waits_can_be_given_two_bounds(worker: dial.DialOfWorker) -> None:
    said = worker.set_ffn_experts("3", "2")
    assert said["ffn_experts"] == 2.5
    assert said["error"].endswith("wanted a number, as nobody says here what waits; start the server with two")
    worker.vllm_config = cast("VllmConfig", SimpleNamespace(**held_at([1, 3])))
    assert worker.set_ffn_experts("2", "3") == {"ffn_experts": 3, "bounds": [2, 3]}
    assert worker.reset_dial() == {"ffn_experts": 3, "bounds": [2, 3]}
    assert "wanted a number or two bounds" in worker.set_ffn_experts("1", "2", "3")["error"]
    assert "wanted a number or two bounds" in worker.set_ffn_experts()["error"]
    assert worker.set_ffn_experts(2) == {"ffn_experts": 2}


@pytest.mark.parametrize(
    ("options", "is_async", "chosen"),
    [({}, True, "_Async"), ({}, False, "_SaysWhatWaits"), (speculation(2), False, "_Gated")],
)
def test_the_engines_scheduler_says_what_waits(
    options: dict[str, Any],
    is_async: bool,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gated = {"draft_gate": True} if chosen == "_Gated" else {}
    assert configured(CHECKPOINT, **options, **held_at(2.5)).scheduler_config.scheduler_cls is None
    vllm_config = configured(CHECKPOINT, **options, **held_at([1, 3], **gated))
    made: list[Any] = []

    def note(scheduler: Any, **_: Any) -> None:
        made.append(type(scheduler))

    monkeypatch.setattr(getattr(scheduling, chosen), "__init__", note)
    monkeypatch.setattr(vllm_config.scheduler_config, "async_scheduling", is_async)  # as vLLM settles later
    vllm_config.scheduler_config.get_scheduler_cls()(vllm_config=vllm_config)  # type: ignore[call-arg]
    assert made == [getattr(scheduling, chosen)]


def test_a_scheduler_of_the_users_has_no_place_beside_two_bounds(checkpoint_of: Callable[[Case], Path]) -> None:
    checkpoint = checkpoint_of(CASES["default"])
    assert configured(checkpoint, scheduler_cls="a.b.C", **held_at(2.5)).scheduler_config.scheduler_cls == "a.b.C"
    with pytest.raises(ValueError, match=r"scheduler_cls is 'a.b.C', wanted none for two bounds, as ours says what wa"):
        configured(checkpoint, scheduler_cls="a.b.C", **held_at([1, 3]))


def test_what_waits_turns_the_dial_before_a_step_of_tokens() -> None:
    router = SimpleNamespace(e_score_correction_bias=torch.zeros(DEFAULT.num_experts))
    dialled = DialledRouters(DEFAULT, [1, 3], [router], CPU)
    worker: Any = SimpleNamespace(
        get_model=lambda: SimpleNamespace(dialled=dialled), scheduler_config=SimpleNamespace(max_num_seqs=4)
    )
    targets: list[float] = []

    def original(_: Any, step: Any) -> str:
        targets.append(dialled.dial.target)
        return "done"

    step: Any = SchedulerOutput.make_empty()
    for tokens, waiting in ((8, None), (0, 4), (8, 4)):
        step.total_num_scheduled_tokens = tokens
        if waiting is not None:
            step.longcat_waiting = waiting
        for _ in range(PLACES * PATIENCE):
            assert dial.follow_queue(original, worker, pickle.loads(pickle.dumps(step))) == "done"
    steps = PLACES * PATIENCE
    assert set(targets[: 2 * steps]) == {3}, "a step without tokens is none"
    assert targets[-1] == 1


class Serving:
    system_fingerprint: Any = dial.FingerprintWithTarget()

    def __init__(self, fingerprint: str | None, architecture: str = ARCHITECTURE) -> None:
        self.system_fingerprint = fingerprint
        self.model_config = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))


def test_a_fingerprint_has_the_present_target(worker: dial.DialOfWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(shared_target.FILE, "")  # to be as it was afterwards
    monkeypatch.setattr(shared_target, "_made", None)
    shared_target.settle(has_dial=False)
    serving, without = Serving("vllm-0.32.0-tp2-12345678"), Serving(None)
    worker.set_ffn_experts("3")
    assert serving.system_fingerprint == "vllm-0.32.0-tp2-12345678"
    shared_target.settle(has_dial=True)
    assert serving.system_fingerprint == "vllm-0.32.0-tp2-12345678", "no rank has written yet"
    for target in (3, 2.375):
        worker.set_ffn_experts(target)
        assert serving.system_fingerprint == f"vllm-0.32.0-tp2-12345678-ffn{target}"
    assert without.system_fingerprint is None
    assert Serving("vllm-0.32.0-tp2-12345678", "LlamaForCausalLM").system_fingerprint == "vllm-0.32.0-tp2-12345678"
    assert isinstance(Serving.system_fingerprint, dial.FingerprintWithTarget)
    assert not hasattr(Serving.__new__(Serving), "system_fingerprint")


def test_vllm_still_makes_its_fingerprint_once() -> None:
    """If this fails, it may ask for what changes, and the descriptor can go."""
    assert "self.system_fingerprint: str | None = get_system_fingerprint(" in inspect.getsource(GenerateBaseServing)


def test_vllm_still_tells_workers_and_models_nothing_of_what_waits() -> None:
    """If this fails, the hook on `execute_model` or our schedulers may go."""
    names = {field.name for kind in (SchedulerOutput, ForwardContext) for field in dataclasses.fields(kind)}
    assert [name for name in names if "waiting" in name or "queue" in name] == []


@pytest.mark.parametrize("target", ["many", None, True, [3], 4, "0", "nan", "inf", 10**400])
def test_a_worker_says_what_is_wrong_and_raises_nothing(target: Any, worker: dial.DialOfWorker) -> None:
    said = worker.set_ffn_experts(target)
    assert said["ffn_experts"] == 2.5
    assert "wanted " in said["error"]


def test_a_worker_of_another_model_says_that_there_is_no_dial(worker: dial.DialOfWorker) -> None:
    worker.get_model = lambda: SimpleNamespace()
    for said in (worker.set_ffn_experts("3", "4", other=5), worker.reset_dial("3")):
        assert said["error"].startswith("there is no dial; start the server with --additional-config")
