"""What `tests/engines/test_strength.py` breaks in SGLang's own terms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def shortcut_added_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MoE's output joins the stream before the second attention, as in a plain MoE layer."""
    from longcat_sglang.model import LongcatFFN, LongcatMoE

    early: list[Tensor] = []

    def moe(self: LongcatMoE, hidden: Tensor) -> Tensor:
        early.append(route_and_compute(self, hidden))
        return torch.zeros_like(hidden)

    def ffn(self: LongcatFFN, hidden: Tensor) -> Tensor:
        return dense(self, hidden) + (early.pop() if early else 0)

    route_and_compute, dense = LongcatMoE.forward, LongcatFFN.forward
    monkeypatch.setattr(LongcatMoE, "forward", moe)
    monkeypatch.setattr(LongcatFFN, "forward", ffn)


def _expert_map_reversed(monkeypatch: pytest.MonkeyPatch) -> None:
    from longcat_sglang import moe

    skip = moe._skip_zero_experts

    def reversed_map(experts: Any, config: Any) -> None:
        skip(experts, config)
        experts.dispatcher.local_expert_mapping[:-1] = experts.dispatcher.local_expert_mapping[:-1].flip(0)

    monkeypatch.setattr(moe, "_skip_zero_experts", reversed_map)


EXPERT_MAP = {"broken": _expert_map_reversed}
"""Engine arguments: every rank takes another's experts."""
