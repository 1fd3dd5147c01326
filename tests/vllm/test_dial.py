"""Where vLLM's options leave no mean to be held, and how workers turn a dial; `engines/test_dial.py` has the rest."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context

from longcat_core.dial import Dial
from longcat_vllm import dial, metrics
from tests.cases import CASES, DEFAULT, Case
from tests.dialled import CPU
from tests.vllm.engine import held_at


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
    held = SimpleNamespace(dialled=SimpleNamespace(dial=Dial(DEFAULT, 2.5, DEFAULT.num_layers, CPU)))
    worker = dial.DialOfWorker()
    worker.get_model = lambda: held
    return worker


def test_a_worker_turns_its_dial_by_what_can_come_over_http(worker: dial.DialOfWorker) -> None:
    assert worker.set_ffn_experts("3") == {"ffn_experts": 3}
    assert worker.set_ffn_experts(1.5) == {"ffn_experts": 1.5}
    worker.get_model().dialled.dial.settings.fill_(0.5)
    assert worker.reset_dial() == {"ffn_experts": 1.5}
    assert not worker.get_model().dialled.dial.settings.any()


@pytest.mark.parametrize("target", ["many", None, True, [3], 4, "0", "nan", "inf", 10**400])
def test_a_worker_says_what_is_wrong_and_raises_nothing(target: Any, worker: dial.DialOfWorker) -> None:
    said = worker.set_ffn_experts(target)
    assert said["ffn_experts"] == 2.5
    assert "wanted " in said["error"]


def test_a_worker_of_another_model_says_that_there_is_no_dial(worker: dial.DialOfWorker) -> None:
    worker.get_model = lambda: SimpleNamespace()
    for said in (worker.set_ffn_experts("3", "4", other=5), worker.reset_dial("3")):
        assert said["error"].startswith("there is no dial; start the server with --additional-config")
