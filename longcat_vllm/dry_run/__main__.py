"""`python -m longcat_vllm.dry_run REQUESTS REPORTS`: dry runs of a list of requests, one after another, on the null GPU
that the environment describes. `longcat dry-run` starts it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from longcat_core.null_gpu import flashinfer_modules, process, triton_driver
from longcat_core.planning.dry_run import Report, request_of, write

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SKIP_P2P_CHECK": "1",  # which copies between GPUs in processes of its own
    "VLLM_NCCL_SO_PATH": process.library("libnccl.so.2"),
    "VLLM_CUDART_SO_PATH": process.library("libcudart.so.13"),
}


def main(requests: Path, reports: Path) -> None:
    os.environ.update(ENVIRONMENT)
    triton_driver.install()
    flashinfer_modules.install()
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from longcat_vllm.dry_run.build import dry_run

    gpus, name = int(os.environ["NULL_GPU_COUNT"]), os.environ["NULL_GPU_NAME"]
    done: list[Report] = []
    for raw in json.loads(requests.read_text()):
        done.append(dry_run(request_of(raw), gpus, name))
        write(done, reports)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
