"""Launches on another device, with the interpreter for it: tensors go there and back as they are."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from longcat_core.kernels.arrange import arrange
from longcat_core.kernels.route import route
from tests.kernels import gpu


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What kernels are launched with, when launches are made elsewhere."""
    arguments: list[tuple[Any, ...]] = []
    real = InterpretedFunction.run

    def run(kernel: Any, *tensors: Any, **options: Any) -> Any:
        arguments.append(tensors)
        return real(kernel, *tensors, **options)

    monkeypatch.setattr(InterpretedFunction, "run", gpu.on("cpu", run))
    return arguments


def test_results_come_back_from_rows_that_lie_apart(given: list[tuple[Any, ...]]) -> None:
    wide = torch.full((3, 31), float("nan"))
    wide[:, :20] = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    ours = route(wide[:, :20], torch.zeros(20), n_routed_experts=20, top_k=4, routed_scaling_factor=1.0)
    wanted = wide[:, :20].softmax(dim=-1).topk(4)
    assert torch.equal(ours.ids, wanted.indices.int())
    torch.testing.assert_close(ours.weights, wanted.values)
    assert given[0][0].stride() == (31, 1)
    assert given[0][0].data_ptr() != wide.data_ptr()


def test_a_tensor_that_stands_in_for_another_is_copied_once(given: list[tuple[Any, ...]]) -> None:
    ids = torch.zeros(2, 1, dtype=torch.int32)
    arrange(ids, 4, 16)
    mine, expert_map = given[0][:2]
    assert mine is expert_map
    assert mine is not ids
