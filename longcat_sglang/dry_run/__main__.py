"""`python -m longcat_sglang.dry_run REQUESTS REPORTS`: dry runs of a list of requests, one after another, on the null
GPU that the environment describes. `longcat dry-run` starts it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import sys
from pathlib import Path

from longcat_core.null_gpu import flashinfer_modules, process, triton_driver
from longcat_core.planning.dry_run import Report, Request

ENVIRONMENT = {
    # What is compiled here is nothing, and must not be found by an engine on a GPU.
    "SGLANG_DG_CACHE_DIR": process.library("deep_gemm"),
    "DG_JIT_CACHE_DIR": process.library("deep_gemm"),
}


def main(requests: Path, reports: Path) -> None:
    os.environ.update(ENVIRONMENT)
    triton_driver.install()
    flashinfer_modules.install()
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from longcat_sglang.dry_run.build import dry_run

    gpus, name = int(os.environ["NULL_GPU_COUNT"]), os.environ["NULL_GPU_NAME"]

    def answer(request: Request) -> Report:
        return dry_run(request, gpus, name)

    process.answer_each(requests, reports, answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
