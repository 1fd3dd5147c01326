"""The compiled kernels for CPUs against their references in higher precision, with each instruction set there is."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longcat_core.kernels.cpu import attention, library, rotary, routing
from longcat_core.kernels.cpu import experts as compiled
from longcat_core.kernels.cpu.experts import CompiledFFN, routed_experts
from longcat_core.kernels.cpu.half_layer import HalfLayer
from longcat_core.kernels.cpu.mla import Mla
from longcat_core.kernels.cpu.mtp import MtpLayer, Norms, Vocabulary
from longcat_core.kernels.cpu.norm import add_rms_norm, rms_norm, takes
from longcat_core.kernels.cpu.product import FEW_ROWS, Projection, choose, product
from longcat_core.kernels.cpu.prompt import attend_to_expanded
from longcat_core.layers import experts as reference
from longcat_core.layers import latent_attention
from longcat_core.layers import rotary as rotary_reference
from longcat_core.layers import routing as routing_reference
from longcat_core.layers.latent_attention import PagedBatch, UpProjection
from longcat_core.weights.blocks import FP8, dequantize_blocks, quantize_blocks
from tests.attention_steps import SCALE, Step, decodes, dense, idle, step, up_projection, verifications
from tests.oracle import relative_error
from tests.threads import threads

ROUNDING = 2**-8
"""Of a result to bf16, over the greatest one."""
EXPERTS_ROUNDING = 4 * ROUNDING
"""Theirs, as what is between the two products is in bf16 where a processor multiplies in bf16. It may cancel out in one
number, and not in eight."""
pytestmark = pytest.mark.skipif(not library.is_available(), reason=library.description())


def has(instruction_set: str) -> bool:
    best = library.description()
    try:
        library.use(instruction_set)
    except ValueError:
        return False
    library.use(best)
    return True


SETS = [name for name in ("generic", "avx2", "avx512", "avx512_bf16") if library.is_available() and has(name)]


@pytest.fixture(autouse=True, params=SETS)
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    best = library.description()
    library.use(request.param)
    yield
    library.use(best)


seeds = st.integers(0, 2**31)


@given(seed=seeds, tokens=st.integers(0, 70), rows=st.integers(1, 70), columns=st.integers(1, 100))
def test_a_product_is_torchs(seed: int, tokens: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    wider = torch.randn(tokens, columns + 3, generator=generator).bfloat16()
    x, weight = wider[:, 1:-2], torch.randn(rows, columns, generator=generator).bfloat16()
    ours = product(x, weight)
    assert ours.shape == (tokens, rows)
    if tokens:
        assert relative_error(ours, x.double() @ weight.double().T) < ROUNDING


def test_a_product_takes_rows_of_any_strides() -> None:
    x = torch.arange(24.0).view(2, 4, 3).bfloat16().transpose(1, 2)
    assert product(x, torch.ones(5, 4).bfloat16()).tolist() == x.sum(dim=-1, keepdim=True).expand(2, 3, 5).tolist()


@given(seed=seeds, tokens=st.integers(0, 10), rows=st.integers(1, 300), columns=st.integers(1, 300))
def test_a_product_in_fp8_is_that_of_numbers_times_scales(seed: int, tokens: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator).bfloat16()
    weight, scales = quantize_blocks(torch.randn(rows, columns, generator=generator))
    scales *= torch.rand(scales.shape, generator=generator) + 0.5
    ours = product(x, weight, scales)
    assert ours.shape == (tokens, rows)
    if tokens:
        assert relative_error(ours, x.double() @ dequantize_blocks(weight, scales).double().T) < ROUNDING


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_every_number_of_fp8_is_read_exactly(tokens: int) -> None:
    """In each place of a group, and in the columns after the last group."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes[(codes & 127) != 127].view(FP8)
    for column in range(40):
        weight = torch.zeros(len(numbers), 40).to(FP8)
        weight[:, column] = numbers
        ones = torch.ones(tokens, 40).bfloat16()
        products = product(ones, weight, torch.full((2, 1), 0.25))
        assert torch.equal(products, (numbers.float() / 4).bfloat16().expand(tokens, -1))


def test_a_product_of_numbers_that_bf16_has_is_exact() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5] * 30]).bfloat16()
    assert product(x, torch.ones(5, 90).bfloat16()).tolist() == [[-15.0] * 5]


@given(
    seed=seeds,
    tokens=st.integers(0, 90),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 5),
    hidden=st.integers(8, 80),
    inner=st.integers(1, 80),
)
def test_experts_are_the_reference(seed: int, tokens: int, experts: int, top_k: int, hidden: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    w13 = (torch.randn(experts, 2 * inner, hidden, generator=generator) * hidden**-0.5).bfloat16()
    w2 = (torch.randn(experts, hidden, inner, generator=generator) * inner**-0.5).bfloat16()
    ids = torch.randint(-1, experts, (tokens, top_k), generator=generator, dtype=torch.int32)
    weights = torch.rand(tokens, top_k, generator=generator)
    ours = routed_experts(x, ids, weights, w13, w2)
    assert ours.shape == x.shape
    if tokens:
        ffn = reference.grouped_ffn(w13.double(), w2.double())
        assert relative_error(ours, reference.routed_experts(x.double(), ids, weights.double(), ffn)) < EXPERTS_ROUNDING


@given(seed=seeds, tokens=st.integers(0, 12), hidden=st.integers(8, 300), inner=st.integers(1, 300))
def test_experts_in_fp8_are_the_reference(seed: int, tokens: int, hidden: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    weights, scales, exact = {}, {}, {}
    for name, shape in shapes.items():
        drawn = [quantize_blocks(torch.randn(shape, generator=generator) * shape[1] ** -0.5) for _ in range(3)]
        weights[name], scales[name] = (torch.stack(each) for each in zip(*drawn, strict=True))
        exact[name] = torch.stack([dequantize_blocks(*each).double() for each in drawn])
    w13, w13_scales, truth13 = (torch.cat((each["gate"], each["up"]), dim=1) for each in (weights, scales, exact))
    ids = torch.randint(-1, 3, (tokens, 4), generator=generator, dtype=torch.int32)
    shares = torch.rand(tokens, 4, generator=generator)
    ours = routed_experts(x, ids, shares, w13, weights["down"], w13_scales, scales["down"])
    assert ours.shape == x.shape
    if tokens:
        ffn = reference.grouped_ffn(truth13, exact["down"])
        assert relative_error(ours, reference.routed_experts(x.double(), ids, shares.double(), ffn)) < EXPERTS_ROUNDING


@pytest.mark.parametrize(("hidden", "inner"), [(64, 48), (1102, 34), (70, 1100), (33, 35)])
def test_many_rows_of_one_expert_are_the_reference(hidden: int, inner: int) -> None:
    """300 rows of one expert, 150 of another, none of the third."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, hidden, generator=generator).bfloat16()
    shapes = (3, 2 * inner, hidden), (3, hidden, inner)
    w13, w2 = (torch.randn(shape, generator=generator).bfloat16() * 0.1 for shape in shapes)
    ids = torch.tensor([[2, -1], [2, 0]], dtype=torch.int32).repeat(150, 1)
    weights = torch.rand(300, 2, generator=generator)
    truth = reference.routed_experts(
        x.double(), ids, weights.double(), reference.grouped_ffn(w13.double(), w2.double())
    )
    assert relative_error(routed_experts(x, ids, weights, w13, w2), truth) < EXPERTS_ROUNDING


def test_many_tokens_are_torchs_on_a_processor_with_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "has_tiles", lambda: True)
    called: list[int] = []
    original = compiled.routed_experts
    monkeypatch.setattr(compiled, "routed_experts", lambda x, *rest: called.append(len(x)) or original(x, *rest))
    generator = torch.Generator().manual_seed(0)
    w13, w2 = (torch.randn(shape, generator=generator).bfloat16() * 0.1 for shape in ((3, 96, 64), (3, 64, 48)))
    ffn = compiled.CompiledExperts(w13, w2)
    for tokens in (compiled.FEW_TOKENS, compiled.FEW_TOKENS + 1):
        x = torch.randn(tokens, 64, generator=generator).bfloat16()
        ids = torch.randint(-1, 3, (tokens, 2), generator=generator, dtype=torch.int32)
        weights = torch.rand(tokens, 2, generator=generator)
        truth = reference.routed_experts(
            x.double(), ids, weights.double(), reference.grouped_ffn(w13.double(), w2.double())
        )
        assert relative_error(ffn(x, ids, weights), truth) < 4 * ROUNDING
    assert called == [compiled.FEW_TOKENS]


def test_a_choice_of_no_expert_is_no_row() -> None:
    """Not even one of weight 0: what nobody chose may be anything."""
    x = torch.ones(3, 64).bfloat16()
    w13, w2 = torch.full((2, 64, 64), torch.nan).bfloat16(), torch.full((2, 64, 32), torch.nan).bfloat16()
    w13[1], w2[1] = 1.0, 1.0
    ids = torch.tensor([[-1, 1], [-1, -1], [1, -1]], dtype=torch.int32)
    outputs = routed_experts(x, ids, torch.ones(3, 2), w13, w2)
    assert outputs.isfinite().all()
    assert outputs[1].tolist() == [0.0] * 64
    assert (outputs[0] > 0).all()


# The compiled kernel wants latents of whole groups.
attention_steps = st.builds(
    step,
    requests=st.lists(
        decodes | verifications | idle | st.tuples(st.integers(60, 200), st.integers(1, 5)), min_size=1, max_size=5
    ),
    block_size=st.sampled_from([1, 7, 16]),
    seed=seeds,
    sizes=st.sampled_from([(2, 6, 4, 32, 5), (9, 33, 2, 64, 20), (4, 32, 32, 96, 32)]),
)


@given(attention_steps)
def test_attention_is_dense_attention(case: Step) -> None:
    case = case.to(torch.bfloat16)
    output = case.run(attention.paged_attention)
    if output.numel():
        assert relative_error(output, case.truth()) < 2 * ROUNDING


@pytest.mark.parametrize("requests", [[(2000, 1)], [(1500, 3)], [(700, 2), (900, 2)]])
def test_a_long_context_in_parts_is_dense_attention(requests: list[tuple[int, int]]) -> None:
    case = step(requests, sizes=(3, 16, 8, 32, 16)).to(torch.bfloat16)
    with threads(4):
        assert relative_error(case.run(attention.paged_attention), case.truth()) < 2 * ROUNDING


def test_prompts_and_what_the_kernel_does_not_take_are_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for sizes, requests in (((2, 6, 4, 8, 5), [(20, 1)]), ((2, 6, 4, 32, 5), [(0, 40), (9, 20)])):
        case = step(requests, sizes=sizes).to(torch.bfloat16)
        monkeypatch.setattr(attention, "_attend", None)
        assert relative_error(case.run(attention.paged_attention), case.truth()) < 2**-5


def a_prompt(length: int, new: int, sizes: tuple[int, int, int, int], seed: int = 0) -> tuple[Tensor, ...]:
    """sizes: heads, nope, rope and value. Returns queries, expanded latents and keys of the rotary embedding."""
    (heads, nope, rope, value), generator = sizes, torch.Generator().manual_seed(seed)
    shapes = (1, new, heads, nope + rope), (1, length, heads, nope + value), (1, length, 3 + rope)
    queries, expanded, rows = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return queries, expanded, rows[..., 3:]


def attended_in_fp64(queries: Tensor, expanded: Tensor, rope_keys: Tensor) -> Tensor:
    queries, expanded, rope_keys = queries[0].double(), expanded[0].double(), rope_keys[0].double()
    (new, heads, width), (length, rope) = queries.shape, rope_keys.shape
    k_nope, values = expanded.split([width - rope, expanded.shape[-1] - width + rope], dim=-1)
    keys = torch.cat((k_nope, rope_keys.unsqueeze(1).expand(-1, heads, -1)), dim=-1)
    scores = torch.einsum("qhd,nhd->hqn", queries, keys) * SCALE
    scores += torch.full((new, length), -torch.inf).triu(length - new + 1)
    return torch.einsum("hqn,nhv->qhv", scores.softmax(dim=-1), values).unsqueeze(0)


def only_group(length: int, new: int) -> latent_attention.RequestGroup:
    (group,) = PagedBatch([0, new], [length], torch.arange(length).view(1, -1), 1).groups
    return group


@given(
    lengths=st.integers(1, 300).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, length))),
    sizes=st.sampled_from(
        [(1, 2, 2, 1), (3, 6, 4, 5), (2, 16, 8, 65), (1, 128, 64, 128), (2, 5, 3, 8), (2, 6, 1, 130)]
    ),
    seed=seeds,
)
def test_a_prompt_is_dense_attention(lengths: tuple[int, int], sizes: tuple[int, int, int, int], seed: int) -> None:
    """Whole or a part of one, of blocks that are full or not, and of widths that are no pairs, which torch takes."""
    prompt = a_prompt(*lengths, sizes, seed)
    attended = attend_to_expanded(*prompt, only_group(*lengths), SCALE)
    error = (attended - attended_in_fp64(*prompt)).abs().max()
    values = prompt[1][..., sizes[1] :]
    assert error < ROUNDING * values.abs().max()  # half of it of the weights, whose sum is 1, and half of the result


def test_scores_that_only_fp32_holds_are_weighed() -> None:
    """The last key's score is 10,000 above the others', so that nothing is left of what was summed before it."""
    queries, expanded, rope_keys = a_prompt(200, 200, (1, 4, 2, 3))
    queries, expanded[:, 150, :, :4], expanded[:, 150, :, 4:] = torch.ones_like(queries), 10_000.0, 7.0
    attended = attend_to_expanded(queries, expanded, rope_keys, only_group(200, 200), SCALE)
    assert attended.isfinite().all()
    assert attended[0, 150:].tolist() == [[[7.0] * 3]] * 50


def test_prompts_of_several_requests_and_trees_are_left_to_torch() -> None:
    case = step([(0, 5), (0, 5)], sizes=(2, 6, 4, 32, 5)).to(torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_attention, "is_prefill", lambda *_: True)
        assert relative_error(case.run(attention.paged_attention), case.truth()) < 2**-5
    prompt, paths = a_prompt(9, 4, (2, 6, 4, 5)), torch.eye(4, dtype=torch.bool)
    paths[:, 0] = True  # three leaves of one root
    tree = replace(only_group(9, 4), trees=paths.unsqueeze(0))
    ours = attend_to_expanded(*prompt, tree, SCALE)
    assert torch.equal(ours, latent_attention.attend_to_expanded(*prompt, tree, SCALE))
    assert not torch.equal(ours, attend_to_expanded(*prompt, only_group(9, 4), SCALE))


def test_where_the_processor_multiplies_in_bf16_no_prompt_of_even_sizes_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(latent_attention, "attend_to_expanded", lambda queries, *_: asked.append(queries.shape))
    for sizes in ((2, 6, 4, 5), (2, 5, 3, 5)):
        attend_to_expanded(*a_prompt(9, 9, sizes), only_group(9, 9), SCALE)
    is_ours = library.library().longcat_instruction_set() == b"avx512_bf16"
    assert asked == [(1, 9, 2, 8)] if is_ours else [(1, 9, 2, 10), (1, 9, 2, 8)]


@given(st.lists(st.integers(1, 90), min_size=1, max_size=4), st.integers(1, 8), seeds)
def test_a_node_of_a_tree_attends_to_its_path(lengths: list[int], nodes: int, seed: int) -> None:
    assert_attends_to_paths(lengths, nodes, seed)


def test_a_part_of_which_a_node_sees_nothing_adds_nothing() -> None:
    """Of contexts of one bucket, the last part is beyond the shorter one."""
    with threads(4):
        assert_attends_to_paths([1030, 2000], 3, seed=0)


def assert_attends_to_paths(lengths: list[int], nodes: int, seed: int) -> None:
    heads, nope, rope, rank, value = 3, 30, 4, 32, 35  # so wide that no tree is attended to as a prompt is
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    trees = torch.rand(len(lengths), nodes, nodes, generator=generator) < 0.5
    trees |= torch.eye(nodes, dtype=torch.bool)
    cache = normal(sum(length + nodes for length in lengths), rank + rope)
    table = torch.zeros(len(lengths), max(lengths) + nodes, dtype=torch.int32)
    order = torch.randperm(len(cache), generator=generator).split([n + nodes for n in lengths])
    for row, slots in zip(table, order, strict=True):
        row[: len(slots)] = slots
    queries = normal(len(lengths) * nodes, heads, nope + rope)
    w_uk, w_uv = normal(heads, nope, rank) * rank**-0.5, normal(heads, value, rank) * rank**-0.5
    starts = range(0, len(queries) + 1, nodes)
    batch = PagedBatch(starts, [n + nodes for n in lengths], table, 1, trees)
    ours = attention.paged_attention(queries, cache, batch, up_projection(w_uk, w_uv), SCALE)
    # Products in bf16 round queries, shares and contexts too: 3.03 at most in 20,000 outputs; the others 0.995.
    bound = (5 if library.description() == "avx512_bf16" else 1.5) * ROUNDING
    for n, output in enumerate(ours):
        r, node = divmod(n, nodes)
        slots = order[r]
        seen = torch.cat((slots[: lengths[r]], slots[lengths[r] :][trees[r, node]]))
        truth = dense(queries[n].unsqueeze(0), cache[seen], w_uk, w_uv)[0]
        assert relative_error(output, truth) < bound


def test_what_other_tokens_left_in_the_cache_is_not_read() -> None:
    """An uninitialised slot may hold NaN."""
    case = step([(40, 1), (3, 1)], sizes=(2, 6, 4, 32, 5)).to(torch.bfloat16)
    cache = case.cache()
    used = [case.slot(r, p) for r, latents in enumerate(case.latents) for p in range(len(latents))]
    free = torch.ones(len(cache), dtype=torch.bool)
    free[used] = False
    cache[free] = float("nan")
    lengths = [len(latents) for latents in case.latents]
    batch = PagedBatch([0, 1, 2], lengths, case.block_table, case.block_size)
    up = up_projection(case.w_uk, case.w_uv)
    queries = torch.cat(case.queries)
    ours = attention.paged_attention(queries, cache, batch, up, SCALE)
    assert relative_error(ours, latent_attention.paged_attention(queries, cache, batch, up, SCALE)) < 2**-5


HEADS, NOPE, ROPE, LATENT, VALUE, Q_RANK, HIDDEN = 3, 6, 4, 32, 5, 11, 40


def mla_weights(generator: torch.Generator, is_fp8: bool) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    def projection(*shape: int) -> Projection:
        return Projection(*quantize_blocks(normal(*shape))) if is_fp8 else Projection(normal(*shape).bfloat16())

    return {
        "qkv_a": projection(Q_RANK + LATENT + ROPE, HIDDEN),
        "q_norm": normal(Q_RANK).bfloat16(),
        "kv_norm": normal(LATENT).bfloat16(),
        "q_b": projection(HEADS * (NOPE + ROPE), Q_RANK),
        "up": UpProjection.of(normal(HEADS * (NOPE + VALUE), LATENT).bfloat16(), HEADS, NOPE),
        "o": projection(HIDDEN, HEADS * VALUE),
        "epsilon": 1e-5,
        "softmax_scale": SCALE,
    }


@given(
    seed=seeds,
    lengths=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 4)), min_size=1, max_size=6),
    is_fp8=st.booleans(),
)
def test_an_mla_in_one_call_is_that_of_its_kernels(seed: int, lengths: list[tuple[int, int]], is_fp8: bool) -> None:
    """To the bit, in what it returns and in what it leaves in the cache."""
    generator = torch.Generator().manual_seed(seed)
    weights = mla_weights(generator, is_fp8)
    new = [count for _, count in lengths]
    starts = [0, *accumulate(new)]
    whole = [before + count for before, count in lengths]
    slots = torch.randperm(sum(whole), generator=generator)
    table = torch.zeros(len(whole), max(whole), dtype=torch.int64)
    new_slots = []
    for row, own, count in zip(table, slots.split(whole), new, strict=True):
        row[: len(own)] = own
        new_slots += own[len(own) - count :].tolist()
    batch = PagedBatch(starts, whole, table, 1)
    x = torch.randn(starts[-1], HIDDEN, generator=generator).bfloat16()
    angles = torch.rand(len(x), 1, ROPE // 2, generator=generator) * 6
    cos, sin, where = angles.cos(), angles.sin(), torch.tensor(new_slots)
    caches = [torch.randn(len(slots), LATENT + ROPE, generator=generator).bfloat16()] * 2
    caches[1] = caches[0].clone()
    ours = Mla(**weights)(x, cos, sin, caches[0], where, batch)

    q_a, latents, keys = product(x, *weights["qkv_a"]).split([Q_RANK, LATENT, ROPE], dim=-1)
    queries = product(rms_norm(q_a, weights["q_norm"], 1e-5), *weights["q_b"]).unflatten(-1, (HEADS, -1))
    queries, keys = rotary.rotate(queries, keys.unsqueeze(1), cos, sin)
    attention.write_latents(caches[1], rms_norm(latents, weights["kv_norm"], 1e-5), keys.squeeze(1), where)
    attended = attention.paged_attention(queries, caches[1], batch, weights["up"], SCALE)
    assert ours is not None
    assert torch.equal(ours, product(attended.flatten(1), *weights["o"]))
    assert torch.equal(*caches)


def test_prompts_and_many_tokens_are_left_to_other_kernels() -> None:
    mla = Mla(**mla_weights(torch.Generator().manual_seed(0), is_fp8=False))
    for requests, new in ((1, 20), (1, FEW_ROWS + 1), (FEW_ROWS + 1, 1), (0, 0)):
        tokens = requests * new
        table = torch.arange(tokens).view(requests, new)
        batch = PagedBatch([n * new for n in range(requests + 1)], [new] * requests, table, 1)
        cache, angles = torch.zeros(tokens, LATENT + ROPE).bfloat16(), torch.ones(tokens, 1, ROPE // 2)
        x = torch.zeros(tokens, HIDDEN).bfloat16()
        assert mla(x, angles, angles, cache, torch.arange(tokens), batch) is None
        assert not cache.any()


def test_an_mla_whose_sizes_do_not_fit_is_refused() -> None:
    weights = mla_weights(torch.Generator().manual_seed(0), is_fp8=False)
    batch = PagedBatch([0, 1], [1], torch.zeros(1, 1, dtype=torch.int64), 1)
    x, angles, slot = torch.zeros(1, HIDDEN).bfloat16(), torch.zeros(1, 1, ROPE // 2), torch.zeros(1)
    cache = torch.zeros(1, LATENT + ROPE).bfloat16()
    for wrong in (
        (x[:, 1:], angles, angles, cache, slot, batch),
        (x, angles[..., 1:], angles, cache, slot, batch),
        (x, angles, angles.double(), cache, slot, batch),
        (x, angles, angles, cache[:, 1:], slot, batch),
        (x, angles, angles, cache, slot[1:], batch),
        (torch.cat([x, x]), torch.cat([angles, angles]), torch.cat([angles, angles]), cache, torch.zeros(2), batch),
    ):
        with pytest.raises(ValueError, match=r"x \[.* slots and a batch of .*, wanted \[T, 40\]"):
            Mla(**weights)(*wrong)
    with pytest.raises(ValueError, match=r"o: strides .* wanted contiguous"):
        Mla(**weights | {"o": Projection(torch.zeros(HIDDEN, HEADS * VALUE + 1).bfloat16()[:, 1:])})
    for name in ("qkv_a", "q_b", "o"):
        with pytest.raises(ValueError, match=r"projections and the latents' norm .* wanted"):
            Mla(**weights | {name: Projection(weights[name].weight[:, 1:])})
    with pytest.raises(ValueError, match=r"q_b: torch\.float32 .* wanted torch\.bfloat16"):
        Mla(**weights | {"q_b": Projection(weights["q_b"].weight.float())})


def a_projection(generator: torch.Generator, *shape: int) -> Projection:
    return Projection((torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16())


def an_ffn(generator: torch.Generator) -> CompiledFFN:
    return CompiledFFN(a_projection(generator, 2 * 24, HIDDEN), a_projection(generator, HIDDEN, 24))


def two_tokens(generator: torch.Generator) -> tuple[Any, ...]:
    """As an `Mla` takes them."""
    batch = PagedBatch([0, 1, 2], [5, 7], torch.arange(14).view(2, 7), 1)
    angles, slots = torch.rand(2, 1, ROPE // 2, generator=generator), torch.tensor([4, 13])
    cache = torch.randn(14, LATENT + ROPE, generator=generator).bfloat16()
    return angles.cos(), angles.sin(), cache, slots, batch


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("is_fp8", [False, True])
def test_half_of_a_layer_is_its_kernels_one_after_the_other(has_residual: bool, is_fp8: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mla, ffn = Mla(**mla_weights(generator, is_fp8)), an_ffn(generator)
    if is_fp8:
        weights = (torch.randn(2 * 128, HIDDEN, generator=generator), torch.randn(HIDDEN, 128, generator=generator))
        ffn = CompiledFFN(*(Projection(*quantize_blocks(weight * 0.1)) for weight in weights))
    norms = [torch.rand(HIDDEN, generator=generator).bfloat16() for _ in range(2)]
    both = torch.randn(2, 2, HIDDEN, generator=generator).bfloat16()
    x, residual = both[:, 0], both[:, 1]  # rows that do not follow each other
    where = two_tokens(generator)
    half = HalfLayer(norms[0], mla, norms[1], ffn, 1e-5)
    made = half(x, residual if has_residual else None, *where)

    normed, total = add_rms_norm(x, residual, norms[0], 1e-5) if has_residual else (rms_norm(x, norms[0], 1e-5), x)
    attended = mla(normed, *where)
    assert attended is not None
    inputs, total = add_rms_norm(attended, total, norms[1], 1e-5)
    assert made is not None
    assert torch.equal(made.inputs, inputs)
    assert torch.equal(made.residual, total)
    wanted = ffn(inputs)
    assert wanted is not None
    assert torch.equal(made.outputs, wanted)


def test_half_of_a_layer_whose_sizes_do_not_fit_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    mla, ffn = Mla(**mla_weights(generator, is_fp8=False)), an_ffn(generator)
    norm = torch.rand(HIDDEN, generator=generator).bfloat16()
    half = HalfLayer(norm, mla, norm, ffn, 1e-5)
    where, x = two_tokens(generator), torch.zeros(2, HIDDEN).bfloat16()
    with pytest.raises(ValueError, match=r"residual: \[1, 40\], wanted \[2, 40\]"):
        half(x, x[:1], *where)
    with pytest.raises(ValueError, match=r"norms and projections of the FFN \(39, 40, .* wanted \(40, 40, "):
        HalfLayer(norm[1:], mla, norm, ffn, 1e-5)
    with pytest.raises(ValueError, match=r"norms and eh_proj: .* wanted"):
        MtpLayer(Norms(*[norm] * len(Norms._fields)), 1e-5, a_projection(generator, HIDDEN, HIDDEN), mla, ffn)
    many = torch.zeros(FEW_ROWS + 1, HIDDEN).bfloat16()
    assert half(many, None, *where) is None


def test_a_chain_is_its_passes_one_after_the_other() -> None:
    """Of which a slot beyond a position is not read: it holds NaN."""
    generator = torch.Generator().manual_seed(0)
    layer, lengths, width = an_mtp_layer(generator), [3, 70, 2, 40, 66], 4
    requests = len(lengths)
    weights = (torch.randn(50, HIDDEN, generator=generator).bfloat16() for _ in range(2))
    vocabulary = Vocabulary(next(weights), next(weights)[:48])
    table = torch.arange(requests * 80).view(requests, 80)
    whole = PagedBatch(range(0, requests * width + 1, width), [length + width for length in lengths], table, 1)
    positions = torch.tensor(lengths) + torch.arange(width - 1).unsqueeze(1)
    slots = table.gather(1, positions.T).T
    positions[-1, 1], slots[-1, 1] = 0, -1  # as of a request at the longest context
    cache = torch.full((requests * 80, LATENT + ROPE), float("nan")).bfloat16()
    for row, length in zip(table, lengths, strict=True):
        cache[row[:length]] = torch.randn(length, LATENT + ROPE, generator=generator).bfloat16()
    angles = torch.rand(width - 1, requests, 1, ROPE // 2, generator=generator)
    first, hidden = torch.tensor([7, 0, 49, 3, 3]), torch.randn(requests, HIDDEN, generator=generator).bfloat16()
    arguments = (angles.cos(), angles.sin(), cache.clone(), slots, whole, positions)
    found = layer.chain(vocabulary, first, hidden, *arguments)
    assert found is not None

    tokens = [first]
    for at, angle, to, output in zip(positions, angles, slots, found.hidden_states, strict=True):
        alone = PagedBatch(range(requests + 1), (at + 1).tolist(), table, 1)
        embedded = vocabulary.embedding[tokens[-1]]
        made = layer(embedded, hidden, angle.cos(), angle.sin(), cache, to, alone)
        assert made is not None
        assert torch.equal(output, made)
        hidden = made
        tokens.append(product(made, vocabulary.head).argmax(dim=-1))
    assert found.hidden_states.isfinite().all()
    assert torch.equal(found.tokens, torch.stack(tokens, dim=1))
    with pytest.raises(ValueError, match=r"tokens, embedding, head: \[\[4\], .* wanted \[\[5\]"):
        layer.chain(vocabulary, first[1:], hidden, *arguments)
    with pytest.raises(ValueError, match=r"tokens: \[8, 1, 50, 4, 4\], wanted rows of an embedding of 50"):
        layer.chain(vocabulary, first + 1, hidden, *arguments)
    with pytest.raises(ValueError, match=r"cos, sin, slots: .*, wanted those of 3 passes over 5 tokens"):
        layer.chain(vocabulary, first, hidden, angles.cos()[:2], *arguments[1:])
    cut = PagedBatch(whole.query_starts, [length + 5 for length in lengths], table[:, :74], 1)
    with pytest.raises(ValueError, match=r"a context of 75 tokens in rows up to 4: .* the 5 rows of 74 blocks of 1 "):
        layer.chain(vocabulary, first, hidden, *arguments[:4], cut, positions)
    many = torch.zeros(FEW_ROWS + 1, dtype=torch.int64)
    of_many = [
        each[:1, :1].expand(1, len(many), *each.shape[2:]) for each in (angles.cos(), angles.sin(), slots, positions)
    ]
    nothing = torch.zeros(len(many), HIDDEN).bfloat16()
    assert layer.chain(vocabulary, many, nothing, *of_many[:2], cache, of_many[2], whole, of_many[3]) is None


@pytest.mark.parametrize("is_fp8", [False, True])
def test_a_draft_after_some_tokens_is_that_of_a_pass_over_all(is_fp8: bool) -> None:
    """To the bit, and the cache has all of them."""
    generator = torch.Generator().manual_seed(0)
    layer, lengths, width = an_mtp_layer(generator, is_fp8), [3, 70, 2, 40, 66], 4
    requests, tokens = len(lengths), len(lengths) * width
    vocabulary = Vocabulary(*(torch.randn(50, HIDDEN, generator=generator).bfloat16() for _ in range(2)))
    table = torch.randperm(requests * 80, generator=generator).view(requests, 80)
    whole = PagedBatch(range(0, tokens + 1, width), [length + width for length in lengths], table, 1)
    before = torch.tensor(lengths).unsqueeze(1)
    slots = table.gather(1, before + torch.arange(width)).flatten()
    caches = [torch.randn(requests * 80, LATENT + ROPE, generator=generator).bfloat16()]
    caches.append(caches[0].clone())
    angles = torch.rand(tokens, 1, ROPE // 2, generator=generator)
    ids = torch.randint(50, (tokens,), generator=generator)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    accepted = torch.tensor([1, 4, 2, 3, 1])
    wanted = torch.arange(0, tokens, width) + accepted - 1
    places = angles.cos(), angles.sin(), caches[0], slots, whole
    found = layer.draft(vocabulary, ids, hidden, *places, wanted, before.squeeze(1) + accepted)

    all_of_them = layer(vocabulary.embedding[ids], hidden, angles.cos(), angles.sin(), caches[1], slots, whole)
    assert found is not None
    assert all_of_them is not None
    assert torch.equal(found.hidden_states, all_of_them[wanted])
    assert torch.equal(found.tokens, product(all_of_them[wanted], vocabulary.head).argmax(dim=-1))
    assert torch.equal(*caches)
    for bad in (wanted + 5, wanted - 2):
        with pytest.raises(ValueError, match=r"wanted: \[.*\], of 20 tokens"):
            layer.draft(vocabulary, ids, hidden, *places, bad, before.squeeze(1) + accepted)
    for beyond in (accepted + 74, accepted - 1):
        with pytest.raises(ValueError, match=r"lengths: \[.*\], wanted from 1 up to the batch's 74"):
            layer.draft(vocabulary, ids, hidden, *places, wanted, beyond)
    with pytest.raises(ValueError, match=r"lengths: \[4\], wanted as many as the 5 requests"):
        layer.draft(vocabulary, ids, hidden, *places, wanted, accepted[1:])
    with pytest.raises(ValueError, match=r"a batch of 20, wanted"):
        layer.draft(vocabulary, ids[1:], hidden[1:], *places, wanted, accepted)


def test_of_equal_logits_a_chain_takes_the_first() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = an_mtp_layer(generator)
    vocabulary = Vocabulary(torch.randn(4, HIDDEN, generator=generator).bfloat16(), torch.zeros(4, HIDDEN).bfloat16())
    cos, sin, cache, slots, batch = two_tokens(generator)
    positions = torch.cat([group.positions for group in batch.groups]).T
    hidden = torch.randn(2, HIDDEN, generator=generator).bfloat16()
    places = (cos.unsqueeze(0), sin.unsqueeze(0), cache, slots.unsqueeze(0), batch, positions)
    found = layer.chain(vocabulary, torch.tensor([1, 2]), hidden, *places)
    assert found is not None
    assert found.tokens.tolist() == [[1, 0], [2, 0]]


@given(seed=seeds, tokens=st.integers(1, 70), rows=st.integers(1, 140), columns=st.integers(1, 100))
def test_of_a_product_the_first_of_the_greatest_is_chosen(seed: int, tokens: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns + 1, generator=generator).bfloat16()[:, 1:]
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
    weight = weight[torch.randint(rows, (rows,), generator=generator)]  # so that some are equal
    assert torch.equal(choose(x, weight), product(x, weight).argmax(dim=-1))


def test_what_is_no_number_is_not_chosen() -> None:
    x, weight = torch.ones(2, 4).bfloat16(), torch.ones(70, 4).bfloat16()
    weight[:33], weight[69], x[1] = torch.nan, 2, torch.nan
    assert choose(x, weight).tolist() == [69, 0]
    for bad in (weight[:, 1:], weight[:0], weight.float()):
        with pytest.raises(ValueError, match="wanted"):
            choose(x, bad)


def an_mtp_layer(generator: torch.Generator, is_fp8: bool = False) -> MtpLayer:
    norms = Norms(*(torch.rand(HIDDEN, generator=generator).bfloat16() for _ in Norms._fields))
    mla, eh_proj = Mla(**mla_weights(generator, is_fp8)), a_projection(generator, HIDDEN, 2 * HIDDEN)
    return MtpLayer(norms, 1e-5, eh_proj, mla, an_ffn(generator))


def test_an_mtp_layer_is_its_modules_one_after_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    mla = Mla(**mla_weights(generator, is_fp8=False))
    norms = Norms(*(torch.rand(HIDDEN, generator=generator).bfloat16() for _ in Norms._fields))
    eh_proj, ffn = a_projection(generator, HIDDEN, 2 * HIDDEN), an_ffn(generator)
    embedded, hidden = (torch.randn(2, HIDDEN, generator=generator).bfloat16() for _ in range(2))
    where = two_tokens(generator)
    layer = MtpLayer(norms, 1e-5, eh_proj, mla, ffn)
    ours = layer(embedded, hidden, *where)

    parts = rms_norm(embedded, norms.embedded, 1e-5), rms_norm(hidden, norms.hidden, 1e-5)
    residual = product(torch.cat(parts, dim=-1), *eh_proj)
    attended = mla(rms_norm(residual, norms.attention, 1e-5), *where)
    assert attended is not None
    inputs, residual = add_rms_norm(attended, residual, norms.ffn, 1e-5)
    outputs = ffn(inputs)
    assert outputs is not None
    assert ours is not None
    assert torch.equal(ours, add_rms_norm(outputs, residual, norms.last, 1e-5)[0])
    many = torch.zeros(FEW_ROWS + 1, HIDDEN).bfloat16()
    assert layer(many, many, *where) is None
    with pytest.raises(ValueError, match=r"last: torch\.float32 .* wanted torch\.bfloat16"):
        MtpLayer(norms._replace(last=norms.last.float()), 1e-5, eh_proj, mla, ffn)


@given(seed=seeds, tokens=st.integers(1, FEW_ROWS), hidden=st.integers(8, 200), is_fp8=st.booleans())
def test_a_dense_ffn_is_swiglu(seed: int, tokens: int, hidden: int, is_fp8: bool) -> None:
    generator, inner = torch.Generator().manual_seed(seed), 128
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    matrices = [torch.randn(shape, generator=generator) * 0.1 for shape in ((2 * inner, hidden), (hidden, inner))]
    if is_fp8:
        quantised = [quantize_blocks(matrix) for matrix in matrices]
        ffn = CompiledFFN.of(*(Projection(*each) for each in quantised))
        gate_up, down = (dequantize_blocks(*each).double() for each in quantised)
    else:
        ffn = CompiledFFN.of(*(Projection(matrix.bfloat16()) for matrix in matrices))
        gate_up, down = (matrix.bfloat16().double() for matrix in matrices)
    assert ffn is not None
    gate, up = (x.double() @ gate_up.T).chunk(2, dim=-1)
    ours = ffn(x)
    assert ours is not None
    assert relative_error(ours, (F.silu(gate) * up) @ down.T) < EXPERTS_ROUNDING


def test_a_dense_ffn_of_many_tokens_or_of_blocks_that_are_cut_is_left_to_other_kernels() -> None:
    weights = [torch.zeros(256, 64), torch.zeros(64, 128)]
    ffn = CompiledFFN.of(*(Projection(weight.bfloat16()) for weight in weights))
    assert ffn is not None
    assert ffn(torch.zeros(FEW_ROWS + 1, 64).bfloat16()) is None
    cut = [quantize_blocks(weight) for weight in (torch.zeros(192, 64), torch.zeros(64, 96))]
    assert CompiledFFN.of(*(Projection(*each) for each in cut)) is None
    with pytest.raises(ValueError, match="wanted a multiple of 128"):
        CompiledFFN(*(Projection(*each) for each in cut))


def test_a_weight_in_fp8_beside_one_in_bf16_is_no_single_call() -> None:
    gate_up, down = torch.zeros(256, 64), torch.zeros(64, 128)
    in_bf16 = Projection(gate_up.bfloat16()), Projection(down.bfloat16())
    in_fp8 = Projection(*quantize_blocks(gate_up)), Projection(*quantize_blocks(down))
    for mixed in ((in_bf16[0], in_fp8[1]), (in_fp8[0], in_bf16[1])):
        assert CompiledFFN.of(*mixed) is None
        with pytest.raises(ValueError, match="one has scales, wanted both or none"):
            CompiledFFN(*mixed)
    x, ids, shares = torch.zeros(1, 64).bfloat16(), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    for (w13, w13_scales), (w2, w2_scales) in ((in_bf16[0], in_fp8[1]), (in_fp8[0], in_bf16[1])):
        scales = [None if each is None else each.unsqueeze(0) for each in (w13_scales, w2_scales)]
        with pytest.raises(ValueError, match="alone, wanted those of both weights"):
            routed_experts(x, ids, shares, w13.unsqueeze(0), w2.unsqueeze(0), *scales)


@given(seed=seeds, rows=st.integers(0, 40), columns=st.integers(1, 1100), scale=st.sampled_from([1e-3, 1.0, 100.0]))
def test_a_norm_is_torchs(seed: int, rows: int, columns: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    wider = (torch.randn(2, rows, columns + 5, generator=generator) * scale).bfloat16()
    x, residual = wider[:, :, 2:-3]
    weight = torch.randn(columns, generator=generator).bfloat16()
    output, (added, both) = rms_norm(x, weight, 1e-5), add_rms_norm(x, residual, weight, 1e-5)
    assert output.shape == added.shape == both.shape == x.shape
    if rows:
        exact = x.double() + residual.double()
        assert torch.equal(both, exact.bfloat16())
        for ours, of in ((output, x.double()), (added, exact)):
            assert relative_error(ours, F.rms_norm(of, (columns,), weight.double(), 1e-5)) < ROUNDING


def test_a_norm_rounds_once() -> None:
    """So that it is the fp32 norm in bf16, but where sums in another order round to the other side."""
    x, weight = torch.randn(2, 200, 512).bfloat16()
    exact = F.rms_norm(x.float(), (512,), weight[0].float(), 1e-5).bfloat16()
    assert (rms_norm(x, weight[0], 1e-5) != exact).float().mean() < 1e-3


def test_a_norm_takes_bf16_in_rows_alone() -> None:
    x, weight = torch.ones(3, 4).bfloat16(), torch.ones(4).bfloat16()
    assert takes(x[:, :2], weight)
    assert not takes(x.float(), weight)
    assert not takes(x, weight.float())
    assert not takes(x.unsqueeze(0), weight)
    assert not takes(x[0], weight)
    assert not takes(x.T, weight)
    with pytest.raises(ValueError, match=r"residual: torch.float32 .* wanted torch.bfloat16"):
        add_rms_norm(x, x.float(), weight, 1e-5)


@given(
    seed=seeds,
    tokens=st.integers(0, 30),
    heads=st.integers(1, 20),
    nope=st.integers(0, 9),
    pairs=st.integers(1, 40),
)
def test_a_rotation_is_the_reference(seed: int, tokens: int, heads: int, nope: int, pairs: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(tokens, heads, nope + 2 * pairs, generator=generator).bfloat16()
    keys = torch.randn(tokens, 2 * pairs + 3, generator=generator).bfloat16()[:, None, 1:-2]
    angles = torch.randn(tokens, 1, pairs, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    truth = rotary_reference.rotate(queries.double(), keys.double(), cos, sin)
    passed = queries[..., :nope].clone()
    ours = rotary.rotate(queries, keys, cos, sin)
    for rotated, given_, wanted in zip(ours, (queries, keys), truth, strict=True):
        assert rotated.data_ptr() == given_.data_ptr()
        if tokens:
            assert relative_error(rotated, wanted) < ROUNDING
    assert torch.equal(ours[0][..., :nope], passed)


def test_a_rotation_in_another_dtype_is_the_reference_and_not_in_place() -> None:
    queries, keys = torch.randn(3, 2, 7), torch.randn(3, 1, 4)
    before = queries.clone(), keys.clone()
    cos, sin = torch.randn(2, 3, 1, 2)
    ours = rotary.rotate(queries, keys, cos, sin)
    for rotated, wanted in zip(ours, rotary_reference.rotate(*before, cos, sin), strict=True):
        assert torch.equal(rotated, wanted)
    assert torch.equal(queries, before[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_latents_are_written_as_by_the_reference(dtype: torch.dtype, index: torch.dtype, tokens: int) -> None:
    latents, keys = torch.randn(tokens, 9).to(dtype)[:, 1:8], torch.randn(tokens, 6).to(dtype)[:, :3]
    slots = torch.tensor([4, -1, 0, 2, -1], dtype=index)[:tokens]
    ours, wanted = torch.zeros(2, 6, 10, dtype=dtype)
    attention.write_latents(ours, latents, keys, slots)
    latent_attention.write_latents(wanted, latents, keys, slots)
    assert torch.equal(ours, wanted)
    assert ours.any() == bool(tokens)


def test_latents_without_slots_are_refused() -> None:
    cache, latents = torch.zeros(6, 10).bfloat16(), torch.ones(3, 10).bfloat16()
    with pytest.raises(ValueError, match="3 latents and 3 keys for 2 slots"):
        attention.write_latents(cache, latents[:, :7], latents[:, 7:], torch.arange(2))


@given(
    seed=seeds,
    tokens=st.integers(0, 80),
    experts=st.integers(1, 30),
    zero=st.integers(0, 30),
    data=st.data(),
)
def test_a_choice_is_the_reference(seed: int, tokens: int, experts: int, zero: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    top_k = data.draw(st.integers(1, experts + zero))
    logits = torch.randn(tokens, experts + zero, generator=generator) * 3
    bias = torch.randn(experts + zero, generator=generator) * 0.1
    sizes = {"n_routed_experts": experts, "top_k": top_k, "routed_scaling_factor": 2.5}
    ours, wanted = routing.route(logits, bias, **sizes), routing_reference.route(logits, bias, **sizes)
    assert torch.equal(ours.ids, wanted.ids)
    assert ours.ids.dtype == torch.int32
    torch.testing.assert_close(ours.weights, wanted.weights)
    torch.testing.assert_close(ours.identity, wanted.identity, rtol=1e-5, atol=1e-6)


def test_a_choice_from_other_dtypes_is_the_references() -> None:
    logits, bias = torch.randn(4, 6).double(), torch.zeros(6)
    sizes = {"n_routed_experts": 4, "top_k": 2, "routed_scaling_factor": 1.0}
    ours, wanted = routing.route(logits, bias, **sizes), routing_reference.route(logits, bias, **sizes)
    assert torch.equal(ours.ids, wanted.ids)


def test_other_dtypes_and_instruction_sets_are_refused_by_name() -> None:
    x, weight = torch.ones(2, 4), torch.ones(3, 4).bfloat16()
    with pytest.raises(ValueError, match=r"x: torch.float32 .* wanted torch.bfloat16"):
        product(x, weight)
    with pytest.raises(ValueError, match=r"weight: .* contiguous in its last dimension"):
        product(x.bfloat16(), torch.ones(4, 3).bfloat16().T)
    with pytest.raises(ValueError, match="w13, w2: strides"):
        routed_experts(
            x.bfloat16(), torch.zeros(2, 1), torch.ones(2, 1), *(torch.ones(4, 2, 4).bfloat16()[::2] for _ in range(2))
        )
    with pytest.raises(ValueError, match="x: 4 columns, wanted 5 as weight has"):
        product(x.bfloat16(), torch.ones(3, 5).bfloat16())
    w13, w2 = torch.ones(3, 8, 5).bfloat16(), torch.ones(3, 4, 4).bfloat16()
    with pytest.raises(ValueError, match=r"w13 \[3, 8, 5\], w2 \[3, 4, 4\]: wanted"):
        routed_experts(x.bfloat16(), torch.zeros(2, 1), torch.ones(2, 1), w13, w2)
    with pytest.raises(ValueError, match=r"residual: \[1, 4\], wanted \[2, 4\] as x has"):
        add_rms_norm(x.bfloat16(), x[:1].bfloat16(), torch.ones(4).bfloat16(), 1e-5)
    fp8, scales = torch.ones(3, 4).to(FP8), torch.ones(1, 1)
    for wrong in (scales.double(), torch.ones(2, 1)):
        with pytest.raises(ValueError, match=r"weight: scales torch.float.* wanted torch.float32 \[1, 1\]"):
            product(x.bfloat16(), fp8, wrong)
    with pytest.raises(ValueError, match=r"weight: torch.bfloat16 .* wanted torch.float8_e4m3fn"):
        product(x.bfloat16(), torch.ones(3, 4).bfloat16(), scales)
    with pytest.raises(ValueError, match="instruction set 'sse9': not of this processor"):
        library.use("sse9")
