"""`python -m longcat_vllm.dry_run REQUESTS REPORTS`: dry runs of a list of requests, one after another, on the null GPU
that the environment describes. `longcat dry-run` starts it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from longcat_core.null_gpu import cutlass_kernels, flashinfer_modules, process, triton_driver
from longcat_core.planning.dry_run import Report, Request

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SKIP_P2P_CHECK": "1",  # which copies between GPUs in processes of its own
    "VLLM_DEEP_GEMM_WARMUP": "skip",
    "VLLM_NCCL_SO_PATH": process.library("libnccl.so.2"),
    "VLLM_CUDART_SO_PATH": process.library("libcudart.so.13"),
    # What is compiled here is nothing, and must not be found by an engine on a GPU.
    "VLLM_CACHE_ROOT": process.library("vllm"),
    "DG_JIT_CACHE_DIR": process.library("deep_gemm"),
}
IMPORTED_ONCE = (
    "vllm.distributed.device_communicators.cuda_communicator",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.models.qwen3_vl",
    "vllm.model_executor.warmup.minimax_m3_msa_warmup",
    "vllm.v1.attention.backends.flashinfer",
    "vllm.v1.attention.backends.mla.flashattn_mla",
    "vllm.v1.attention.backends.mla.flashmla",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu_worker",
    "longcat_vllm.mtp",
)
"""What vLLM imports for every deployment, needed or not, here once."""


def main(requests: Path, reports: Path) -> None:
    os.environ.update(ENVIRONMENT)
    triton_driver.install()
    flashinfer_modules.install()
    cutlass_kernels.install()
    from vllm.model_executor.models import registry
    from vllm.plugins import load_general_plugins

    registry._run_in_subprocess = lambda fn: fn()  # in a process that would import all of this again
    load_general_plugins()
    for module in IMPORTED_ONCE:
        importlib.import_module(module)
    from longcat_vllm.dry_run.build import dry_run

    gpus, name = int(os.environ["NULL_GPU_COUNT"]), os.environ["NULL_GPU_NAME"]

    def answer(request: Request) -> Report:
        return dry_run(request, gpus, name)

    process.answer_each(requests, reports, answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
