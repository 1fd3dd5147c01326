"""The tests of this folder, run in a process of their own with Triton's interpreter."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def test_kernels_are_their_references_in_tritons_interpreter() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rf",
        f"--confcutdir={FOLDER}",
        "-p",
        "no:cacheprovider",
        str(FOLDER),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-10000:] + run.stderr[-2000:]
