"""`python -m longcat_vllm.dry_run REQUESTS REPORTS`: dry runs of a list of requests, one after another, on the null GPU
that the environment describes. `longcat dry-run` starts it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from longcat_core.null_gpu import flashinfer_modules, triton_driver
from longcat_core.planning.dry_run import Report, Request, write


def main(requests: Path, reports: Path) -> None:
    triton_driver.install()
    flashinfer_modules.install()
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from longcat_vllm.dry_run.build import dry_run

    machine = f"{os.environ['NULL_GPU_COUNT']} x {os.environ['NULL_GPU_NAME']}"
    done: list[Report] = []
    for raw in json.loads(requests.read_text()):
        done.append(dry_run(Request(**{**raw, "options": tuple(raw["options"])}), machine))
        write(done, reports)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
