"""Starts an engine package's dry runs on the null GPU: a process that imports the engine, and a fork of it for each."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from longcat_core.null_gpu.build import LIBRARY, NullGpuError, build, variables
from longcat_core.planning.dry_run import Report, Request, read, request_of, write
from longcat_core.planning.hardware import Machine


def run(package: str, requests: Sequence[Request], machine: Machine, is_verbose: bool = False) -> list[Report]:
    """A report for each request. package: that of the engine, `longcat_vllm`.

    Raises:
        NullGpuError: if there can be no null GPU here, or the process died.
    """
    environment = {**os.environ, **variables(build(), machine)}
    with tempfile.TemporaryDirectory(prefix="longcat-dry-run-") as directory:
        asked, answered, log = (Path(directory) / name for name in ("requests.json", "reports.json", "log"))
        asked.write_text(json.dumps([asdict(request) for request in requests]))
        with log.open("w") as output:
            done = subprocess.run(
                [sys.executable, "-m", f"{package}.dry_run", str(asked), str(answered)],
                env=environment,
                stdout=None if is_verbose else output,
                stderr=None if is_verbose else output,
            )
        reports = read(answered) if answered.exists() else []
        if done.returncode or len(reports) < len(requests):
            told = log.read_text()[-4000:]
            raise NullGpuError(f"the dry run ended with status {done.returncode}, wanted 0:\n{told}")
        return reports


def answer_each(requests: Path, reports: Path, answer: Callable[[Request], Report]) -> None:
    """In the process that `run` has started, once the engine is imported: a fork for each request, as an engine does
    not give back all that it takes. One that dies has a report of that."""
    gc.freeze()  # what was imported is not looked through by each fork's collections, which are many
    done: list[Report] = []
    for raw in json.loads(requests.read_text()):
        request, scratch = request_of(raw), reports.with_name(f"report-{len(done)}.json")
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            status = 1
            try:
                write([answer(request)], scratch)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if scratch.exists():
            done += read(scratch)
        else:
            failed = f"the process of this dry run ended with status {os.waitstatus_to_exitcode(status)}"
            done.append(Report(request, engine="", machine="", failed=failed))
        write(done, reports)


def library(name: str) -> str:
    """In a process on the null GPU: where one of NVIDIA's libraries is, for whom an environment variable tells that."""
    return str(Path(os.environ["LD_PRELOAD"].removesuffix(LIBRARY)) / name)
