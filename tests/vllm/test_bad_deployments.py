"""What vLLM alone can be asked for and LongCat cannot be served with, and weights that vLLM's loaders bring."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longcat_core.weights import checkpoint
from longcat_core.weights.audit import CheckpointError
from tests.cases import Case, write_checkpoint
from tests.engines.test_bad_checkpoints import CASE, EXPERT, NORM, TENSORS, refusal
from tests.vllm.engine import serving


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", CASE.config, TENSORS)


def test_attention_without_mla_is_refused(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    envs.disable_envs_cache()  # an engine in this process has turned it on
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    assert "it needs MLA, which VLLM_MLA_DISABLE turns off; unset that" in refusal(good)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's MLA backends take an FP8 cache")
def test_an_fp8_cache_on_a_cpu_is_refused(good: Path) -> None:
    assert "kv_cache_dtype: 'fp8', wanted 'auto' on a CPU" in refusal(good, kv_cache_dtype="fp8")


def test_a_draft_model_of_another_checkpoint_is_refused(good: Path) -> None:
    speculation = {"method": "mtp", "num_speculative_tokens": 1, "model": str(good.parent)}
    (good.parent / "config.json").write_text((good / "config.json").read_text())
    message = refusal(good, speculative_config=speculation)
    assert "wanted none: the MTP layer is part of" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="another model runner may draft on the last of many stages")
@pytest.mark.parametrize(
    ("option", "value"), [("kv_cache_dtype", "fp8"), ("use_local_argmax_reduction", True), ("quantization", "fp8")]
)
def test_options_of_a_draft_model_of_its_own_are_refused(option: str, value: object, good: Path) -> None:
    speculation = {"method": "mtp", "num_speculative_tokens": 1, option: value}
    assert f"speculative_config.{option}: {value!r}, wanted none" in refusal(good, speculative_config=speculation)


def test_drafts_on_two_pipeline_stages_are_refused(good: Path) -> None:
    speculation = {"method": "mtp", "num_speculative_tokens": 1}
    message = refusal(good, speculative_config=speculation, pipeline_parallel_size=2)
    assert "pipeline_parallel_size: 2, wanted 1 with drafts" in message


def test_routed_experts_that_cannot_be_told_from_zero_experts_are_not_returned() -> None:
    """vLLM's runner for CPUs returns none at all."""
    from longcat_vllm.deployment import _unsupported_experts

    asked = SimpleNamespace(
        aux_output_config=SimpleNamespace(enable_return_routed_experts=True),
    )
    (problem,) = _unsupported_experts(asked)
    assert "a zero expert (-1) would be expert 255 or 65535" in problem


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM has these on a GPU")
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"data_parallel_size": 2}, "data_parallel_size: 2 without expert parallelism, on a CPU"),
        ({"data_parallel_size": 2, "data_parallel_rank": 1}, "data_parallel_size: 2 without expert parallelism"),
        (
            {"data_parallel_size": 2, "data_parallel_size_local": 1, "data_parallel_hybrid_lb": True}
            | {"data_parallel_start_rank": 0, "data_parallel_address": "127.0.0.1"},
            "data_parallel_size: 2 without expert parallelism, on a CPU",
        ),
        (
            {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
            "decode_context_parallel_size: 2, wanted 1 on a CPU",
        ),
        ({"prefill_context_parallel_size": 2}, "prefill context parallel"),
        ({"ubatch_size": 2}, "Microbatching"),
        (
            {"tensor_parallel_size": 2, "additional_config": {"longcat": {"overlap": True}}},
            """--additional-config '{"longcat": {"overlap": true}}': no tokens are sent to experts""",
        ),
    ],
)
def test_ranks_that_a_cpu_cannot_have_are_refused(options: dict[str, Any], wanted: str, good: Path) -> None:
    assert wanted in refusal(good, **options)


def test_extra_and_misshapen_tensors_of_a_loader_are_all_listed(checkpoint_of: Callable[[Case], Path]) -> None:
    brought = {EXPERT: torch.zeros(33, 64), NORM: TENSORS[NORM], "model.norm.bias": torch.zeros(64)}
    with serving(checkpoint_of(CASE)) as served, pytest.raises(CheckpointError) as refused:
        served.model.load_weights(brought.items())
    assert str(refused.value).splitlines()[1:] == [
        f"  misshapen: {EXPERT} is [33, 64], wanted [32, 64]",
        "  extra: model.norm.bias [64]; remove it, or check config.json",
    ]


def test_a_tensor_that_the_first_load_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a checkpoint from the hub, which is not there yet when a local one is checked; vLLM misses no expert."""
    monkeypatch.setattr(checkpoint, "verify", lambda *args, **kwargs: None)
    brought = {name: tensor for name, tensor in TENSORS.items() if name != EXPERT}
    with pytest.raises(CheckpointError) as refused, serving(write_checkpoint(tmp_path, CASE.config, brought)):
        pass
    assert str(refused.value).splitlines()[1:] == [f"  missing: {EXPERT} [32, 64]"]


def test_every_refusal_is_a_row_of_the_table_of_options_and_the_reverse() -> None:
    from longcat_core.plugin import engine
    from longcat_core.plugin.options import Outcome
    from longcat_vllm import adapters, deployment, loading
    from longcat_vllm.devices.cpu import device
    from longcat_vllm.options import OPTIONS

    rooms = [Path(room.__file__) for room in (adapters, deployment, loading, device, engine)]
    named = {flag for room in rooms for text in texts_of(room) for flag in re.findall(r"--[a-z0-9-]+", text)}
    refused = {option.name for option in OPTIONS if option.outcome in (Outcome.REFUSED, Outcome.WITH_EXCEPTIONS)}
    untried = {o.name for o in OPTIONS if o.outcome is Outcome.UNTRIED and "Refused on a CPU" in o.why}
    assert named == refused | untried


def texts_of(room: Path) -> list[str]:
    """The strings in a room's functions, which are its messages, without what documents them."""
    texts: list[str] = []
    for function in ast.walk(ast.parse(room.read_text())):
        if isinstance(function, ast.FunctionDef):
            constants = [node.value for node in ast.walk(function) if isinstance(node, ast.Constant)]
            documentation = ast.get_docstring(function, clean=False)
            texts += [value for value in constants if isinstance(value, str) and value != documentation]
    return texts
