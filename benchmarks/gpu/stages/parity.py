"""Test suites, run by pytest: the kernels' on the device, and the engines' with whole models."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.cases import Context, Row, key

ROOT = Path(__file__).parents[3]
ENGINE_TESTS = ("tests/engines/test_cuda.py",)


def kernels(context: Context) -> Iterator[Row]:
    """`tests/kernels` on the device, in several processes where pytest-xdist is: most of their time is compiling."""
    where = "LONGCAT_KERNELS_ON_GPU" if context.device.type == "cuda" else "TRITON_INTERPRET"
    folder = ROOT / "tests/kernels"
    spread = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") and context.device.type == "cuda" else []
    # Without what tests of engines need.
    yield from _pytest([*spread, f"--confcutdir={folder}", *context.sizes.parity_tests], {where: "1"}, context)


def engines(context: Context) -> Iterator[Row]:
    """`tests/engines/test_cuda.py` in the engine that is installed; each test starts one."""
    if context.device.type != "cuda" or not (find_spec("vllm") or find_spec("sglang")):
        missing = "no engine is installed here" if context.device.type == "cuda" else "needs a GPU"
        yield {"case": {"test": "all"}, "missing": missing}
        return
    yield from _pytest(list(ENGINE_TESTS), {}, context)


def _pytest(arguments: list[str], variables: dict[str, str], context: Context) -> Iterator[Row]:
    """A row as each test ends; tests that have one already are left out."""
    known = [argument for name in context.done for argument in ("--deselect", json.loads(name)["test"])]
    with tempfile.TemporaryDirectory() as folder:
        results, output = Path(folder) / "results", Path(folder) / "output"
        results.touch()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.pytest_rows"]
        environment = {**os.environ, **variables, "LONGCAT_PYTEST_ROWS": str(results)}
        with output.open("w") as log, results.open() as lines:
            run = subprocess.Popen([*command, *known, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log)
            while True:
                has_ended = run.poll() is not None
                for line in lines:
                    row = json.loads(line)
                    if key(row["case"]) not in context.done:
                        yield row
                if has_ended:
                    break
                time.sleep(0.2)
        if run.returncode not in (0, 1, 5):  # all passed, some failed, none were left
            raise RuntimeError(f"pytest ended with {run.returncode}: {output.read_text()[-3000:]}")
