"""What `tests/engines/test_strength.py` breaks in vLLM's own terms."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def shortcut_added_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MoE's output joins the stream before the second attention, as in a plain MoE layer."""
    from longcat_vllm.model import LongcatDecoderLayer

    def forward(
        self: LongcatDecoderLayer, hidden: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, choices: None
    ) -> object:
        if residual is None:
            residual, hidden = hidden, self.input_layernorm[0](hidden)
        else:
            hidden, residual = self.input_layernorm[0](hidden, residual)
        hidden, residual = self.post_attention_layernorm[0](self.self_attn[0](hidden, cos, sin), residual)
        shortcut = self.mlp.end(self.mlp.compute(self.mlp.begin(hidden), between=hidden), between=hidden)
        dense = self.mlps[0].summed(self.mlps[0].partial(hidden), shortcut.partial)
        hidden, residual = self.input_layernorm[1](dense, residual + shortcut.whole)
        hidden, residual = self.post_attention_layernorm[1](self.self_attn[1](hidden, cos, sin), residual)
        return self.mlps[1](hidden), residual

    monkeypatch.setattr(LongcatDecoderLayer, "forward", forward)


EXPERT_MAP = {"worker_extension_cls": "tests.vllm.broken_expert_map.BrokenExpertMap"}
"""Engine arguments: vLLM's ranks are processes of their own, into which no patch of this one reaches."""


def target_embedding_in_the_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    from longcat_vllm.mtp import LongcatFlashMTP

    monkeypatch.delattr(LongcatFlashMTP, "has_own_embed_tokens")


def drafts_without_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    from longcat_vllm.mtp import LongcatMTPLayer

    def forward(self: LongcatMTPLayer, embedded: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor) -> object:
        return layer(self, embedded, torch.zeros_like(hidden), cos, sin)

    layer = LongcatMTPLayer.forward
    monkeypatch.setattr(LongcatMTPLayer, "forward", forward)


def drafts_a_position_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its own context tells positions: all of them shifted alike would change nothing."""
    from longcat_vllm.mtp import LongcatMTPModel

    def forward(self: LongcatMTPModel, input_ids: Tensor, positions: Tensor, *rest: Tensor) -> Tensor:
        return model(self, input_ids, positions * 2, *rest)

    model = LongcatMTPModel.forward
    monkeypatch.setattr(LongcatMTPModel, "forward", forward)


DRAFTS = [target_embedding_in_the_drafts, drafts_without_the_target, drafts_a_position_late]
