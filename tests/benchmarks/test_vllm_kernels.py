"""What the benchmarks ask of vLLM is what it takes, and what it gives is right; its tiles are as computed with."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import vllm_kernels
from benchmarks.gpu.cases import MissingError
from benchmarks.gpu.checks import LIMITS
from tests.benchmarks.interpreted_vllm import ENVIRONMENT

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """A process of its own, as Triton is told of its interpreter, and vLLM of no platform, before they are imported."""
    command = [sys.executable, "-m", "tests.benchmarks.interpreted_vllm"]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_vllms_moe_is_called_as_it_wants(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["errors"]) == 6
    for name, error in interpreted["errors"].items():
        assert error < LIMITS[name.split(",")[0]], name


def test_vllms_small_kernels_are_called_as_they_want(interpreted: dict[str, Any]) -> None:
    assert interpreted["pieces"] == dict.fromkeys(("route", "arrange", "combine", "rows in FP8"), "result")


def test_vllms_tiles_are_those_that_its_times_are_computed_with(interpreted: dict[str, Any]) -> None:
    for name, (ours, theirs) in interpreted["tiles"].items():
        assert ours == theirs, name


def test_without_a_gpu_vllms_kernels_are_missing() -> None:
    with pytest.raises(MissingError, match="on a GPU alone"):
        vllm_kernels.require()
