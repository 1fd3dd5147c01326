"""An engine's experts are given the rows of FFN experts and nothing else, counted."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat_core.layers.experts import ExpertFFN, routed_experts
from longcat_core.reference import LongcatForCausalLM, Router
from tests.cases import CASES, Case
from tests.harness import engine


@pytest.mark.parametrize("name", ["default", "all_slots_zero_experts", "no_zero_experts"])
def test_zero_experts_cost_no_gemm_rows(name: str, checkpoint_of: Callable[[Case], Path], tmp_path: Path) -> None:
    """The rows that the kernel is given for a prompt are the slots in which the reference takes FFN experts."""
    case, counts = CASES[name], tmp_path / "rows"
    directory, prompt = checkpoint_of(case), case.prompts(1, 50)[0]
    with engine.serving(directory, broken=partial(count_rows, counts)) as served:
        counts.write_text("")  # forget what the engine computed to warm up
        served.greedy([prompt], 1)
    rows = [int(count) for count in counts.read_text().split()]
    wanted = [slots for slots in ffn_slots(directory, prompt) if slots]
    assert rows[: len(wanted)] == wanted  # an engine may have computed a step ahead before it noticed the end
    assert bool(rows) == bool(wanted)


def count_rows(counts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Append the rows of every call of a kernel to a file, as the engine may be another process."""

    def counting(
        hidden_states: Tensor, ids: Tensor, weights: Tensor, ffn: ExpertFFN, expert_map: Tensor | None = None
    ) -> Tensor:
        def counted(rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
            with counts.open("a") as file:
                file.write(f"{experts.numel()} ")
            return ffn(rows, experts, weights)

        return routed_experts(hidden_states, ids, weights, counted, expert_map)

    monkeypatch.setattr(import_module(f"{engine.PACKAGE}.devices.cpu.experts"), "routed_experts", counting)


def ffn_slots(directory: Path, prompt: list[int]) -> list[int]:
    """By layer, how many slots of the prompt the reference gives to FFN experts."""
    model, slots = LongcatForCausalLM.from_checkpoint(directory), []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda _module, _inputs, routing: slots.append(int((routing.ids >= 0).sum())))
    with torch.no_grad():
        model(torch.tensor([prompt]))
    return slots
