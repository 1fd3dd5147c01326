"""The layer that is captured in a graph is LongCat's: against `reference.DecoderLayer`, on the same weights."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.checks import worst_token_error
from benchmarks.gpu.layer import RankLayer, Step, two_products
from benchmarks.gpu.layer_moe import reference_moe
from benchmarks.gpu.sizes import TINY
from longcat_core.layers import rotary
from longcat_core.reference import DecoderLayer

CPU = torch.device("cpu")
CONFIG = replace(TINY.config, num_attention_heads=4)


def reference(layer: RankLayer) -> DecoderLayer:
    """In fp32, with the layer's weights."""
    config, found = layer.config, DecoderLayer(layer.config)
    state: dict[str, Tensor] = {}
    for i, weights in enumerate(layer.attentions):
        query, latent = weights.qkv_a.split([config.q_lora_rank, config.latent_dim])
        kv_b = torch.cat((weights.w_uk, weights.w_uv), dim=1).flatten(0, 1)
        of_attention = {
            "q_a_proj": query,
            "q_a_layernorm": weights.q_norm / config.q_scale,
            "q_b_proj": weights.q_b,
            "kv_a_proj_with_mqa": latent,
            "kv_a_layernorm": weights.latent_norm / config.kv_scale,
            "kv_b_proj": kv_b,
            "o_proj": weights.o,
        }
        state |= {f"self_attn.{i}.{name}.weight": tensor for name, tensor in of_attention.items()}
        gate, up = layer.ffns[i].gate_up.chunk(2)
        for name, tensor in {"gate_proj": gate, "up_proj": up, "down_proj": layer.ffns[i].down}.items():
            state[f"mlps.{i}.{name}.weight"] = tensor
    for norm, name in zip(
        layer.norms,
        ("input_layernorm.0", "post_attention_layernorm.0", "input_layernorm.1", "post_attention_layernorm.1"),
        strict=True,
    ):
        state[f"{name}.weight"] = norm
    state["mlp.router.classifier.weight"] = layer.router
    state["mlp.router.e_score_correction_bias"] = torch.zeros(config.num_experts)
    state["mlp.experts.w13"], state["mlp.experts.w2"] = layer.experts.w13, layer.experts.w2
    found.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return found


@torch.no_grad()
@pytest.mark.parametrize("new_tokens", [1, 2])
def test_a_decode_step_is_the_end_of_the_references_forward_pass(new_tokens: int) -> None:
    requests, context = 3, 7
    layer = RankLayer(CONFIG, 1, CONFIG.n_routed_experts, "16 bit", CPU)
    x = torch.randn(requests, context, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    positions = torch.arange(context).expand(requests, -1)
    cos, sin = rotary.cos_sin(positions, rotary.inverse_frequencies(CONFIG), 1.0)
    wanted, caches = reference(layer)(x.float(), cos, sin, None)

    step = layer.step(requests, new_tokens, context)
    filled = tuple(cache.bfloat16().clone() for cache in caches)
    for cache in filled:
        cache[:, -new_tokens:] = float("nan")  # the step has to write them
    step = Step(step.cos, step.sin, (filled[0], filled[1]))
    found = layer(x[:, -new_tokens:].flatten(0, 1), step, reference_moe(layer), two_products)
    assert worst_token_error(found, wanted[:, -new_tokens:].flatten(0, 1)) < 0.03
    for cache, exact in zip(filled, caches, strict=True):
        torch.testing.assert_close(cache.float(), exact, rtol=0.05, atol=0.05)


def test_ranks_share_heads_and_dense_ffns() -> None:
    whole, part = (RankLayer(CONFIG, ranks, 4, "16 bit", CPU) for ranks in (1, 2))
    assert part.attentions[0].w_uk.shape[0] == whole.attentions[0].w_uk.shape[0] // 2
    assert part.attentions[0].o.shape == (128, whole.attentions[0].o.shape[1] // 2)
    assert part.ffns[0].down.shape[1] == whole.ffns[0].down.shape[1] // 2
    assert part.router.shape == whole.router.shape


class FakeStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_on_two_streams_the_moe_starts_after_its_input_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    main, side = FakeStream("main", log), FakeStream("side", log)

    @contextmanager
    def stream(which: FakeStream):  # type: ignore[no-untyped-def]
        log.append(f"on {which.name}")
        yield
        log.append(f"off {which.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    layer = RankLayer(CONFIG, 1, 4, "16 bit", CPU)
    x, moe = layer.hidden_states(2), reference_moe(layer)

    def logged_moe(normed: Tensor) -> Tensor:
        log.append("moe")
        return moe(normed)

    step = layer.step(2, 1, 5)
    one = layer(x, step, moe, two_products)
    both = layer(x, step, logged_moe, two_products, side)  # type: ignore[arg-type]
    assert torch.equal(one, both)
    assert log == ["side waits for main", "on side", "moe", "off side", "main waits for side"]
