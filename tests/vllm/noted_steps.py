"""A worker extension for tests/vllm/data_parallel.py, imported by vLLM in each rank: what a step ran, and was sent."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.distributed import get_ep_group
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from longcat_vllm.devices.cpu.exchange import link_of

OPERATORS = (
    "vllm::unified_mla_attention_with_output",
    "longcat::exchange_begin",
    "longcat::exchange_compute",
    "longcat::exchange_end",
)
PRODUCTS = {"_C::onednn_mm": (1, 0), "longcat::cpu_product": (0, 1)}
"""Where the input of a product is among its arguments, and what has as many columns, or rows, as its output."""

operations: list[str | tuple[int, int]] = []


class NotedSteps:
    def noted(self) -> tuple[int, list[str | tuple[int, int]]]:
        """Bytes that were sent so far, and the operations of the first step that was executed."""
        return link_of(get_ep_group().device_group).sent_bytes, operations


def execute_model(runner: CPUModelRunner, *args: Any, **kwargs: Any) -> Any:
    if operations:
        return execute(runner, *args, **kwargs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        result = execute(runner, *args, **kwargs)
    for event in sorted(profile.events(), key=lambda each: each.time_range.start):
        if event.name in OPERATORS:
            operations.append(event.name)
        elif event.name in PRODUCTS:
            shapes: Any = event.input_shapes
            taken, made = PRODUCTS[event.name]
            operations.append((shapes[taken][1], shapes[made][1 if event.name == "_C::onednn_mm" else 0]))
    return result


execute = CPUModelRunner.execute_model
pytest.MonkeyPatch().setattr(CPUModelRunner, "execute_model", execute_model)
