"""Kernels run in Triton's interpreter, which must be asked for before Triton is imported.

Therefore most files are collected with TRITON_INTERPRET=1 only: `test_interpreter.py` starts a process for them, as
other tests of the same process, and the servers that they start, must not have it.
"""
# SPDX-License-Identifier: Apache-2.0

import os
from pathlib import Path

import torch
from hypothesis import settings

THE_OTHERS = ["test_interpreter.py", "test_compiled.py"]

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernels import interpreter

    collect_ignore = THE_OTHERS
    settings.register_profile("kernels", deadline=None, max_examples=20)
    settings.load_profile("kernels")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what `torch.empty` gives with NaN, integers with their greatest
    interpreter.repair()
else:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in THE_OTHERS]
