"""What `tests/engines/test_strength.py` breaks in vLLM's own terms."""

from __future__ import annotations

import pytest
from torch import Tensor


def shortcut_added_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MoE's output joins the stream before the second attention, as in a plain MoE layer."""
    from longcat_vllm.model import LongcatDecoderLayer

    def forward(self: LongcatDecoderLayer, hidden: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor) -> object:
        if residual is None:
            residual, hidden = hidden, self.input_layernorm[0](hidden)
        else:
            hidden, residual = self.input_layernorm[0](hidden, residual)
        hidden, residual = self.post_attention_layernorm[0](self.self_attn[0](hidden, cos, sin), residual)
        hidden, residual = self.input_layernorm[1](self.mlps[0](hidden) + self.mlp(hidden), residual)
        hidden, residual = self.post_attention_layernorm[1](self.self_attn[1](hidden, cos, sin), residual)
        return self.mlps[1](hidden), residual

    monkeypatch.setattr(LongcatDecoderLayer, "forward", forward)


EXPERT_MAP = {"worker_extension_cls": "tests.vllm.broken_expert_map.BrokenExpertMap"}
"""Engine arguments: vLLM's ranks are processes of their own, into which no patch of this one reaches."""
