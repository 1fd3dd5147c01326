"""Which product SGLang's linear layers get on a CPU, by rows and by what the processor multiplies."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from longcat_core.kernels.cpu import product
from longcat_core.kernels.cpu.product import FEW_ROWS
from longcat_sglang.devices.cpu import linear


@pytest.mark.parametrize("multiplies_bf16", [True, False])
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_is_cores_where_that_is_quicker(
    multiplies_bf16: bool, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = torch.nn.Linear(4, 3, bias=False, dtype=dtype)
    called: list[int] = []

    def noted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        called.append(len(x))
        return torch.nn.functional.linear(x, weight)

    monkeypatch.setattr(product, "multiplies_bf16", lambda: multiplies_bf16)
    monkeypatch.setattr(product, "is_available", lambda: True)
    monkeypatch.setattr(linear, "product", noted)
    linear.CompiledLinearMethod().apply(layer, torch.ones(rows, 4, dtype=dtype))
    is_cores = dtype == torch.bfloat16 and (not multiplies_bf16 or rows <= FEW_ROWS)
    assert called == ([rows] if is_cores else [])
