"""Which layers are in FP8, and what becomes of FP8 weights that are not kept."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longcat_core import spellings
from longcat_core.config import LongcatConfig
from longcat_core.quantization import Quantization
from longcat_core.weights.audit import CheckpointError
from longcat_core.weights.blocks import dequantize_blocks
from longcat_core.weights.names import SCALE_SUFFIX
from longcat_core.weights.precision import Precision, dequantized
from tests.cases import CHAT, published
from tests.fp8 import CONFIG, dequantised, released

PACKED = {"gate_up_proj": ["gate_proj", "up_proj"], "fused": ["q_a_proj", "kv_a_proj_with_mqa"]}
LAYER, ATTENTION = "model.layers.0", "model.layers.0.self_attn.1"
FP8 = Quantization("fp8")
CHAT_FP8 = replace(spellings.read(CHAT), quantization=FP8)


class Kernels:
    """Of any size; what was asked for."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def take_linear(self, projections: Sequence[str], rows: Sequence[int], columns: int) -> bool:
        self.asked.append((list(projections), list(rows), columns))
        return True

    def take_experts(self, inner: int, hidden: int) -> bool:
        self.asked.append((inner, hidden))
        return True


def precision(quantization: Quantization | None = FP8, config: LongcatConfig = CONFIG, **drafter: Any) -> Precision:
    return Precision(replace(config, quantization=quantization), PACKED, Kernels(), **drafter)


def test_a_kernel_is_asked_for_with_the_sizes_of_one_rank() -> None:
    kernels = Kernels()
    chat = Precision(CHAT_FP8, PACKED, kernels)
    for module in ("fused", "q_b_proj", "kv_b_proj", "o_proj"):
        assert chat.keeps(f"{ATTENTION}.{module}", ranks=8)
    for module in ("gate_up_proj", "down_proj"):
        assert chat.keeps(f"{LAYER}.mlps.0.{module}", ranks=8)
    assert chat.keeps_experts(f"{LAYER}.mlp.experts", ranks=16)
    assert kernels.asked == [
        (["q_a_proj", "kv_a_proj_with_mqa"], [1536, 576], 6144),
        (["q_b_proj"], [1536], 1536),
        (["kv_b_proj"], [2048], 512),
        (["o_proj"], [6144], 1024),
        (["gate_proj", "up_proj"], [1536, 1536], 6144),
        (["down_proj"], [6144], 1536),
        (128, 6144),
    ]


@pytest.mark.parametrize("half", ["q_a_proj", "kv_a_proj_with_mqa"])
def test_a_fused_layer_is_in_fp8_if_both_halves_are(half: str) -> None:
    assert precision().keeps(f"{ATTENTION}.fused", ranks=1)
    ignoring = precision(Quantization("fp8", ignored=(f"{ATTENTION}.{half}",)))
    assert not ignoring.keeps(f"{ATTENTION}.fused", ranks=1)
    assert ignoring.keeps(f"{LAYER}.self_attn.0.fused", ranks=1)


@pytest.mark.parametrize(
    ("changes", "module", "ranks"),
    [
        ({"q_lora_rank": 96}, f"{ATTENTION}.fused", 1),  # the latent's rows would begin inside a block
        ({"ffn_hidden_size": 192}, f"{LAYER}.mlps.0.gate_up_proj", 1),
        ({}, f"{LAYER}.mlps.0.gate_up_proj", 4),
        ({}, f"{LAYER}.mlps.0.down_proj", 4),
        ({}, f"{ATTENTION}.o_proj", 4),
        ({}, f"{ATTENTION}.q_b_proj", 4),
    ],
)
def test_a_layer_whose_blocks_are_cut_is_not_in_fp8(changes: dict[str, int], module: str, ranks: int) -> None:
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    assert not precision(config=config).keeps(module, ranks)
    assert precision().keeps(module, ranks=1)


def test_a_last_block_may_be_a_part_of_one() -> None:
    assert precision(config=replace(CONFIG, ffn_hidden_size=192)).keeps(f"{LAYER}.mlps.0.down_proj", ranks=1)


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens", f"{LAYER}.mlp.router.classifier"])
def test_other_layers_are_not_in_fp8(module: str) -> None:
    assert not precision().keeps(module, ranks=1)


def test_one_expert_that_is_not_in_fp8_makes_all_of_its_layer_so() -> None:
    ignoring = precision(Quantization("fp8", ignored=(f"{LAYER}.mlp.experts.3.up_proj",)))
    assert not ignoring.keeps_experts(f"{LAYER}.mlp.experts", ranks=1)
    assert ignoring.keeps_experts("model.layers.1.mlp.experts", ranks=1)


@pytest.mark.parametrize("quantization", [None, Quantization("fp8", block=(64, 128))])
def test_nothing_is_in_fp8_without_published_blocks(quantization: Quantization | None) -> None:
    assert not precision(quantization).keeps(f"{ATTENTION}.o_proj", ranks=1)
    assert not precision(quantization).keeps_experts(f"{LAYER}.mlp.experts", ranks=1)


def test_of_the_mtp_layer_its_tensors_decide_and_not_the_config() -> None:
    """SGLang calls it `model.layers.0`, as the model's own first layer."""
    o_proj = "model.mtp.layers.0.self_attn.o_proj.weight"
    disabled = Quantization("fp8", disabled=("mtp",))
    for quantization in (FP8, disabled):
        with_tensors = precision(quantization, drafter=(LAYER, {o_proj}))
        assert with_tensors.keeps(f"{LAYER}.self_attn.o_proj", ranks=1)
        assert not with_tensors.keeps(f"{LAYER}.self_attn.q_b_proj", ranks=1)


def stream(order: str) -> list[tuple[str, Tensor]]:
    tensors = list(released(CONFIG, published(CONFIG)).items())
    if order == "scales first":
        tensors.reverse()
    if order == "any":
        random.Random(0).shuffle(tensors)
    return tensors


@pytest.mark.parametrize("order", ["as written", "scales first", "any"])
def test_weights_that_are_not_kept_are_multiplied_by_their_scales(order: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tensors = stream(order)
    found = dict(dequantized(tensors, CONFIG, lambda weight: weight.endswith(".o_proj.weight"), logging.getLogger()))
    exact = dequantised(dict(tensors))
    kept = {name for name in exact if name.endswith(".o_proj.weight")}
    assert found.keys() == exact.keys() | {name + SCALE_SUFFIX for name in kept}
    for name, tensor in dict(tensors).items():
        if name.removesuffix(SCALE_SUFFIX) in kept:
            assert found[name] is tensor
        elif not name.endswith(SCALE_SUFFIX):
            assert torch.equal(found[name].float(), exact[name])
    (line,) = caplog.messages
    assert f"{sum('.down_proj.' in name for name in exact)} down_proj" in line


def test_a_buffer_may_be_read_into_again() -> None:
    """As some of vLLM's loaders do."""
    name = "model.layers.0.self_attn.0.o_proj.weight"
    release = released(CONFIG, published(CONFIG))
    buffer = release[name].clone()

    def reusing() -> Any:
        yield name, buffer
        buffer.view(torch.uint8).zero_()
        yield name + SCALE_SUFFIX, release[name + SCALE_SUFFIX]

    ((_, found),) = dequantized(reusing(), CONFIG, lambda _: False, logging.getLogger())
    assert torch.equal(found, dequantize_blocks(release[name], release[name + SCALE_SUFFIX]))


@pytest.mark.parametrize("lost", ["weight", "scales"])
def test_a_weight_without_its_scales_is_named(lost: str) -> None:
    name = "model.layers.0.self_attn.0.o_proj.weight"
    missing, there = (name, name + SCALE_SUFFIX) if lost == "weight" else (name + SCALE_SUFFIX, name)
    tensors = [each for each in stream("any") if each[0] != missing]
    with pytest.raises(CheckpointError, match=f"missing: {missing}, without which {there} cannot be read"):
        list(dequantized(tensors, CONFIG, lambda _: False, logging.getLogger()))


def test_what_came_alone_waits_for_the_next_chunk(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tensors, waiting = stream("any"), dict[str, Tensor]()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        found |= dequantized([(name, tensor)], CONFIG, lambda _: False, logging.getLogger(), waiting)
    assert not waiting
    exact = dequantised(dict(tensors))
    assert found.keys() == exact.keys()
    assert all(torch.equal(found[name].float(), exact[name]) for name in found)
    assert not caplog.messages, "it is told of a first load"
