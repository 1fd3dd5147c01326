"""The tests of this folder in processes of their own: in Triton's interpreter, and on a GPU if there is one."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


def run_with(variable: str) -> None:
    """All of them pass where the variable is set."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command = [*pytest, f"--confcutdir={FOLDER}", str(FOLDER)]  # without what tests of engines need
    environment = {**os.environ, variable: "1"}
    run = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-10000:] + run.stderr[-2000:]


def test_kernels_are_their_references_in_tritons_interpreter() -> None:
    run_with("TRITON_INTERPRET")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_kernels_are_their_references_on_a_gpu() -> None:
    run_with("LONGCAT_KERNELS_ON_GPU")
