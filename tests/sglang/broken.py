"""What `tests/engines/test_strength.py` breaks in SGLang's own terms."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def shortcut_added_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MoE's output joins the stream before the second attention, as in a plain MoE layer."""
    from longcat_core.layers.experts import Shortcut
    from longcat_sglang.model import LongcatFFN, LongcatMoE

    early: list[Tensor] = []

    def moe(self: LongcatMoE, hidden: Tensor, choices: None) -> Shortcut:
        shortcut = route_and_compute(self, hidden)
        assert shortcut.partial is not None, "no transport"
        early.append(shortcut.partial + shortcut.whole)  # on one rank
        return Shortcut(torch.zeros_like(hidden), torch.zeros_like(hidden))

    def summed(self: LongcatFFN, partial: Tensor, others: Tensor | None = None) -> Tensor:
        return of_both(self, partial, early.pop() if early else others)

    route_and_compute, of_both = LongcatMoE.forward, LongcatFFN.summed
    monkeypatch.setattr(LongcatMoE, "forward", moe)
    monkeypatch.setattr(LongcatFFN, "summed", summed)


def _expert_map_reversed(monkeypatch: pytest.MonkeyPatch) -> None:
    from longcat_sglang import moe

    skip = moe._skip_zero_experts

    def reversed_map(experts: Any, config: Any) -> None:
        skip(experts, config)
        experts.dispatcher.local_expert_mapping[:-1] = experts.dispatcher.local_expert_mapping[:-1].flip(0)

    monkeypatch.setattr(moe, "_skip_zero_experts", reversed_map)


EXPERT_MAP = {"broken": _expert_map_reversed}
"""Engine arguments: every rank takes another's experts."""


def target_embedding_in_the_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As SGLang's own drafters do it."""
    from longcat_sglang.mtp import LongcatFlashMTP

    def set_embed_and_head(self: LongcatFlashMTP, embed: Tensor, head: Tensor) -> None:
        self.model.embed_tokens.weight = embed

    monkeypatch.setattr(LongcatFlashMTP, "set_embed_and_head", set_embed_and_head)


def drafts_without_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    from longcat_sglang.mtp import LongcatMTPLayer

    def forward(self: LongcatMTPLayer, embedded: Tensor, forward_batch: Any, inputs: dict[str, Any]) -> Tensor:
        forward_batch.spec_info.hidden_states = torch.zeros_like(forward_batch.spec_info.hidden_states)
        return layer(self, embedded, forward_batch, inputs)

    layer = LongcatMTPLayer.forward
    monkeypatch.setattr(LongcatMTPLayer, "forward", forward)


def drafts_a_position_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its own context tells positions: all of them shifted alike would change nothing."""
    from longcat_sglang.mtp import LongcatMTPModel

    def forward(self: LongcatMTPModel, input_ids: Tensor, positions: Tensor, forward_batch: Any) -> Tensor:
        return model(self, input_ids, positions * 2, forward_batch)

    model = LongcatMTPModel.forward
    monkeypatch.setattr(LongcatMTPModel, "forward", forward)


DRAFTS = [target_embedding_in_the_drafts, drafts_without_the_target, drafts_a_position_late]
