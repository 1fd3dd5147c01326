"""vLLM with Triton, which its CPU build turns off, interpreted; only where Triton is told so before it is imported."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

from tests.interpreted import IS_INTERPRETED

if IS_INTERPRETED:
    import torch

    from tests.kernels import interpreter
    from tests.vllm.interpreted import gpu

    gpu.turn_triton_on()
    interpreter.repair()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what `torch.empty` gives with NaN, integers with their greatest
else:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py")]
