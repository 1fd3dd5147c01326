"""Which FP8 weights an engine keeps for the compiled kernels."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence

from longcat_core.quantization import PUBLISHED_BLOCK
from longcat_core.weights.precision import Fp8Kernels


class CompiledFp8Kernels(Fp8Kernels):
    """Those of any size, where `product.takes_fp8`."""

    def take_linear(self, projections: Sequence[str], rows: Sequence[int], columns: int) -> bool:
        """Of `kv_b_proj` attention needs the numbers."""
        return projections[0] != "kv_b_proj"

    def take_experts(self, inner: int, hidden: int) -> bool:
        """An engine has gate and up projection in one tensor, where the latter's scales begin with a block."""
        return inner % PUBLISHED_BLOCK[0] == 0
