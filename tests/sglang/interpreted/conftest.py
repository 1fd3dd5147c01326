"""SGLang's Triton kernels, interpreted; only where Triton is told so before it is imported."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

from tests.interpreted import IS_INTERPRETED

if IS_INTERPRETED:
    import sglang.srt.entrypoints.engine  # noqa: F401  # as a process that runs an engine: ours prepares a CPU then
    import torch

    from tests.kernels import interpreter

    interpreter.repair()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what `torch.empty` gives with NaN, integers with their greatest
else:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py")]
