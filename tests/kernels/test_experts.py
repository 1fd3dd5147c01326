"""Experts over arranged rows against a loop over choices in fp64, and all of a rank against `layers.experts`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longcat_core.kernels import moe as kernels
from longcat_core.kernels.arrange import arrange
from longcat_core.kernels.experts import ExpertWeights, expert_outputs, inner_bytes
from longcat_core.kernels.moe import routed_experts
from longcat_core.kernels.route import route
from longcat_core.kernels.tiles import DEFAULT, TILES, Tile, tile_for
from longcat_core.layers import experts as reference
from longcat_core.weights.blocks import dequantize_blocks, quantize_blocks

UNIT = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def tile(rows: int, columns: int, depth: int, is_swapped: bool) -> Tile:
    return Tile(rows, columns, depth, warps=4, stages=2, is_swapped=is_swapped)


def random_weights(generator: torch.Generator, experts: int, hidden: int, inner: int) -> tuple[Tensor, Tensor]:
    w13 = torch.randn(experts, 2 * inner, hidden, generator=generator) * hidden**-0.5
    return w13, torch.randn(experts, hidden, inner, generator=generator) * inner**-0.5


def random_ids(generator: torch.Generator, tokens: int, top_k: int, experts: int, kept: float) -> Tensor:
    ids = torch.randint(experts, (tokens, top_k), generator=generator, dtype=torch.int32)
    return ids.masked_fill(torch.rand(tokens, top_k, generator=generator) >= kept, -1)


def loop(x: Tensor, ids: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """[T, K, H] in fp64, NaN where an id is -1."""
    outputs = torch.full((*ids.shape, x.shape[1]), float("nan"), dtype=torch.float64)
    for token, column in (ids >= 0).nonzero().tolist():
        expert = int(ids[token, column])
        gate, up = (w13[expert].double() @ x[token].double()).chunk(2)
        outputs[token, column] = w2[expert].double() @ (F.silu(gate) * up)
    return outputs


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 9),
    experts=st.sampled_from([1, 2, 7, 128]),
    top_k=st.integers(1, 5),
    hidden=st.sampled_from([16, 40, 65]),
    inner=st.sampled_from([8, 33]),
    kept=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from(list(UNIT)),
    rows=st.sampled_from([16, 32]),
    is_swapped=st.booleans(),
)
def test_outputs_are_those_of_a_loop_over_choices(
    seed: int,
    tokens: int,
    experts: int,
    top_k: int,
    hidden: int,
    inner: int,
    kept: float,
    dtype: torch.dtype,
    rows: int,
    is_swapped: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w13, w2 = (weight.to(dtype) for weight in random_weights(generator, experts, hidden, inner))
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    ids = random_ids(generator, tokens, top_k, experts, kept)
    arrangement = arrange(ids, experts, rows)
    ours = expert_outputs(x, arrangement, ExpertWeights(w13, w2), tile(rows, 32, 32, is_swapped))
    assert (ours.dtype, ours.shape) == (dtype, (tokens, top_k, hidden))
    truth = loop(x, ids, w13, w2)
    assert torch.equal(ours.isnan(), truth.isnan()), "a choice of -1 is not written, and any other is"
    if (ids >= 0).any():
        error = (ours.double() - truth).nan_to_num().abs().max() / truth.nan_to_num().abs().max()
        assert error < (2 if dtype != torch.float32 else 8) * UNIT[dtype]


def quantized(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each expert's weight as published in FP8."""
    codes, scales = zip(*(quantize_blocks(weight) for weight in weights), strict=True)
    return torch.stack(codes), torch.stack(scales)


def loop_in_fp8(x: Tensor, ids: Tensor, weights: ExpertWeights) -> Tensor:
    """[T, K, H] as the kernels round: x and what is between the products in FP8, all else in fp64."""
    assert weights.w13_scales is not None
    assert weights.w2_scales is not None
    outputs = torch.full((*ids.shape, x.shape[1]), float("nan"), dtype=torch.float64)
    x = dequantize_blocks(*quantize_blocks(x, (1, 128)), block=(1, 128)).double()
    for token, column in (ids >= 0).nonzero().tolist():
        expert = int(ids[token, column])
        w13 = dequantize_blocks(weights.w13[expert], weights.w13_scales[expert]).double()
        w2 = dequantize_blocks(weights.w2[expert], weights.w2_scales[expert]).double()
        gate, up = (w13 @ x[token]).chunk(2)
        inner = (F.silu(gate) * up).float().unsqueeze(0)
        outputs[token, column] = w2 @ dequantize_blocks(*quantize_blocks(inner, (1, 128)), block=(1, 128)).double()[0]
    return outputs


@pytest.mark.parametrize("is_swapped", [False, True])
@pytest.mark.parametrize(("hidden", "inner"), [(128, 128), (200, 256)])
def test_fp8_is_that_of_a_loop_that_rounds_alike(hidden: int, inner: int, is_swapped: bool) -> None:
    generator = torch.Generator().manual_seed(hidden)
    w13, w2 = random_weights(generator, 3, hidden, inner)
    w13[1] *= 20  # another scale for each expert
    (w13, w13_scales), (w2, w2_scales) = quantized(w13), quantized(w2)
    weights = ExpertWeights(w13, w2, w13_scales, w2_scales)
    x, ids = torch.randn(7, hidden, generator=generator).half(), random_ids(generator, 7, 3, 3, 0.6)
    ours = expert_outputs(x, arrange(ids, 3, 16), weights, tile(16, 128, 128, is_swapped))
    truth = loop_in_fp8(x, ids, weights)
    assert torch.equal(ours.isnan(), truth.isnan())
    for token, column in (ids >= 0).nonzero().tolist():
        wanted = truth[token, column]
        # Where fp32 and fp64 differ, a number between the products may be rounded to the next of e4m3.
        assert (ours[token, column].double() - wanted).abs().max() < 2**-7 * wanted.abs().max()
        assert (ours[token, column].double() - wanted).abs().median() < 2**-10 * wanted.abs().max()


@pytest.mark.parametrize("is_fp8", [False, True])
def test_memory_may_be_given_and_the_result_lie_where_the_first_product_was(is_fp8: bool) -> None:
    """As vLLM gives it: the result shares the memory between the products, and what is there before is NaN."""
    generator = torch.Generator().manual_seed(4)
    w13, w2 = random_weights(generator, 3, 128, 128)
    weights = ExpertWeights(w13.half(), w2.half())
    if is_fp8:
        (w13, w13_scales), (w2, w2_scales) = quantized(w13), quantized(w2)
        weights = ExpertWeights(w13, w2, w13_scales, w2_scales)
    x, ids = torch.randn(7, 128, generator=generator).half(), random_ids(generator, 7, 4, 3, 0.6)
    given = torch.rand(7, 4, generator=generator)
    inner = torch.full((7, 4, 128), float("nan"), dtype=torch.float16)
    assert inner.nbytes >= inner_bytes(28, torch.float16, weights)
    outputs, result = torch.full_like(inner, float("nan")), inner.view(-1)[: 7 * 128].view(7, 128)
    ours = routed_experts(x, ids, given, weights, "NVIDIA X", inner=inner, outputs=outputs, result=result)
    assert ours is result
    assert torch.equal(outputs.isnan().all(dim=2), ids < 0)
    assert torch.equal(ours, routed_experts(x, ids, given, weights, "NVIDIA X"))
    with pytest.raises(ValueError, match=f"wanted {inner_bytes(28, torch.float16, weights)}"):
        routed_experts(x, ids, given, weights, "NVIDIA X", inner=inner[:1])
    with pytest.raises(ValueError, match=r"outputs \(7, 4, 64\) .* \(7, 4, 128\) in torch.float16"):
        routed_experts(x, ids, given, weights, "NVIDIA X", outputs=outputs[:, :, :64])


@pytest.mark.parametrize("zero_bias", [0.0, 9.0])
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_the_kernels_together_are_the_moe(tokens: int, zero_bias: float) -> None:
    """With a bias of 9 all choices are zero experts."""
    generator = torch.Generator().manual_seed(tokens)
    w13, w2 = random_weights(generator, 6, 24, 16)
    x, logits = torch.randn(tokens, 24, generator=generator), torch.randn(tokens, 10, generator=generator)
    bias = torch.tensor([0.0] * 6 + [zero_bias] * 4)
    routing = route(logits, bias, n_routed_experts=6, top_k=4, routed_scaling_factor=6.0)
    assert zero_bias == 0 or (routing.ids == -1).all()
    routed = routed_experts(x, routing.ids, routing.weights, ExpertWeights(w13, w2), "NVIDIA X")
    ours = reference.add_identity(routed, x, routing.identity)
    torch.testing.assert_close(ours, reference.moe(x, routing, w13, w2), rtol=1e-4, atol=1e-5)


def test_ranks_with_a_part_of_the_experts_each_sum_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    w13, w2 = random_weights(generator, 6, 24, 16)
    x, logits = torch.randn(5, 24, generator=generator), torch.randn(5, 10, generator=generator)
    routing = route(logits, torch.zeros(10), n_routed_experts=6, top_k=4, routed_scaling_factor=6.0)
    total = torch.zeros(5, 24)
    for local in ([5, 1], [0, 2, 3, 4]):
        expert_map = torch.full((6,), -1, dtype=torch.int32)
        expert_map[local] = torch.arange(len(local), dtype=torch.int32)
        experts = ExpertWeights(w13[local], w2[local])
        total += routed_experts(x, routing.ids, routing.weights, experts, "NVIDIA X", expert_map)
    ours = reference.add_identity(total, x, routing.identity)
    torch.testing.assert_close(ours, reference.moe(x, routing, w13, w2), rtol=1e-4, atol=1e-5)


def test_the_tile_is_for_the_rows_of_an_expert_on_average() -> None:
    """A batch of 16 bit whose rows an expert are few and one where they are many: both are the reference's."""
    generator = torch.Generator().manual_seed(0)
    w13, w2 = (weight.half() for weight in random_weights(generator, 2, 24, 16))
    for tokens in (3, 40):
        x, ids = torch.randn(tokens, 24, generator=generator).half(), random_ids(generator, tokens, 2, 2, 0.9)
        weights = torch.rand(tokens, 2, generator=generator)
        ours = routed_experts(x, ids, weights, ExpertWeights(w13, w2), "NVIDIA X")
        truth = reference.routed_experts(x.double(), ids, weights, reference.grouped_ffn(w13.double(), w2.double()))
        assert (ours.double() - truth).abs().max() < 2**-9 * truth.abs().max()


@pytest.mark.parametrize(
    ("has_map", "spread_over", "rows"), [(False, None, 4), (True, None, 2), (False, 12, 1), (True, 12, 1)]
)
def test_a_rank_with_few_of_the_experts_does_not_take_the_tile_of_all_rows(
    has_map: bool, spread_over: int | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 choices, which 3 local experts have a part of: of the 6 of all ranks, and of 6 zero experts with them."""
    asked: list[int] = []
    monkeypatch.setattr(kernels, "tile_for", lambda *given: asked.append(given[2]) or tile_for(*given))
    expert_map = torch.tensor([-1, 0, -1, 1, -1, 2], dtype=torch.int32) if has_map else None
    x, ids = torch.zeros(6, 8), torch.zeros(6, 2, dtype=torch.int32)
    weights = ExpertWeights(torch.zeros(3, 8, 8), torch.zeros(3, 8, 4))
    routed_experts(x, ids, torch.zeros(6, 2), weights, "NVIDIA X", expert_map, spread_over=spread_over)
    assert asked == [rows]


def test_every_precision_has_tiles_for_any_number_of_rows() -> None:
    for precisions in TILES.values():
        for precision, tiles in precisions.items():
            limits = [rows for rows, _ in tiles]
            assert limits == sorted(set(limits))
            assert limits[-1] == 1 << 30, "more rows than there can be"
            if precision == "fp8":
                assert all((tile.columns, tile.depth) == (128, 128) for _, tile in tiles)
    assert tile_for("NVIDIA X", "16 bit", 17) == TILES[DEFAULT]["16 bit"][1][1]
    assert tile_for("NVIDIA X", "16 bit", 16) == TILES[DEFAULT]["16 bit"][0][1]


def test_weights_that_do_not_fit_are_an_error() -> None:
    w13, w2 = torch.zeros(2, 256, 64), torch.zeros(2, 64, 128)
    with pytest.raises(ValueError, match=r"w13 of shape \(2, 250, 64\) .* wanted \(2, 256, 64\)"):
        ExpertWeights(w13[:, :250], w2)
    with pytest.raises(ValueError, match=r"scales None .* wanted \(2, 2, 1\)"):
        ExpertWeights(w13.to(torch.float8_e4m3fn), w2.to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="FP8 experts of inner size 64: wanted a multiple of 128"):
        ExpertWeights(w13[:, :128].to(torch.float8_e4m3fn), w2[:, :, :64].to(torch.float8_e4m3fn))


def test_calls_that_do_not_fit_are_an_error() -> None:
    x, ids = torch.zeros(1, 64), torch.zeros(1, 2, dtype=torch.int32)
    weights = ExpertWeights(torch.zeros(2, 256, 64), torch.zeros(2, 64, 128))
    with pytest.raises(ValueError, match="wanted blocks of 32 rows, as the tile has"):
        expert_outputs(x, arrange(ids, 2, 16), weights, tile(32, 32, 32, False))
    with pytest.raises(ValueError, match=r"hidden states \(2, 64\), .* wanted \(1, 64\), contiguous"):
        expert_outputs(torch.zeros(2, 64), arrange(ids, 2, 16), weights, tile(16, 32, 32, False))
    with pytest.raises(ValueError, match=r"hidden states in torch.float16: wanted torch.float32"):
        expert_outputs(x.half(), arrange(ids, 2, 16), weights, tile(16, 32, 32, False))
    codes = (torch.zeros(2, 256, 64).to(torch.float8_e4m3fn), torch.zeros(2, 64, 128).to(torch.float8_e4m3fn))
    weights = ExpertWeights(*codes, torch.ones(2, 2, 1), torch.ones(2, 1, 1))
    with pytest.raises(ValueError, match="wanted 128 columns and a depth of 128"):
        expert_outputs(x, arrange(ids, 2, 16), weights, tile(16, 64, 128, False))
