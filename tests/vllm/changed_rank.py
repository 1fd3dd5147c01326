"""For `engine.in_each_rank`: a worker extension, imported by vLLM in each rank, which makes the change."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import pickle

import pytest


class ChangedRank:
    """Nothing is asked of it: what makes the change is that this module is imported."""


pickle.loads(bytes.fromhex(os.environ["LONGCAT_TEST_CHANGE"]))(pytest.MonkeyPatch())
