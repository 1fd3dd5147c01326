"""Where the tests of kernels run: in Triton's interpreter, or on a GPU.

Triton must be told of its interpreter before it is imported. Therefore most files are collected with TRITON_INTERPRET=1
or LONGCAT_KERNELS_ON_GPU=1 only: `test_processes.py` starts a process for each, as other tests of the same process, and
the servers that they start, must not have it.
"""
# SPDX-License-Identifier: Apache-2.0

import os
from pathlib import Path

import torch
from hypothesis import settings

THE_OTHERS = ["test_processes.py", "test_compiled.py"]
OF_THE_INTERPRETER = ["test_repairs.py", "test_gpu.py"]
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if IS_INTERPRETED or os.environ.get("LONGCAT_KERNELS_ON_GPU") == "1":
    settings.register_profile("kernels", deadline=None, max_examples=20)
    settings.load_profile("kernels")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what `torch.empty` gives with NaN, integers with their greatest
    if IS_INTERPRETED:
        from tests.kernels import interpreter

        collect_ignore = THE_OTHERS
        interpreter.repair()
    else:
        from triton.runtime.jit import JITFunction

        from tests.kernels import gpu

        collect_ignore = THE_OTHERS + OF_THE_INTERPRETER
        JITFunction.run = gpu.on("cuda", JITFunction.run)
else:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in THE_OTHERS]
