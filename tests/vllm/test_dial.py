"""Where vLLM's options leave no mean to be held; `engines/test_dial.py` has what a dial does."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context

from longcat_vllm import dial, metrics
from tests.cases import CASES, Case


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
