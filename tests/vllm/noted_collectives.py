"""A worker extension, imported by vLLM in each rank, whose forward passes are then noted (`tests/collectives.py`)."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
from pathlib import Path

import pytest
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.model_executor.layers.layernorm import RMSNorm

from longcat_vllm.model import LongcatModel
from tests.collectives import note


class NotedCollectives:
    """Nothing is asked of it: passes are noted as this module is imported."""


note(Path(os.environ["LONGCAT_TEST_COLLECTIVES"]), GroupCoordinator, LongcatModel, RMSNorm, pytest.MonkeyPatch())
