"""The time of a decode step: measured steps of Flash-Lite, bounds, overlap, and what must hold for any deployment."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longcat_core.planning.costs import Cost, Load, layer_costs, timed
from longcat_core.planning.drafts import Drafts
from longcat_core.planning.hardware import gpu
from longcat_core.planning.imbalance import random_imbalance, read_counts, recorded_imbalance
from longcat_core.planning.layout import Layout, layouts, precision
from longcat_core.planning.models import model
from longcat_core.planning.plan import Deployment
from longcat_core.planning.rates import Rates, rates, sets
from longcat_core.planning.step import StepTime, schedule, step_time

CHAT, LITE = model("chat"), model("lite")
STOCK = rates(gpu("H800"), "stock")


def deployment(**changes: object) -> Deployment:
    found = Deployment(CHAT, "128 x H800", STOCK, Layout(1, 128, 128), precision("fp8"), context=5000)
    return replace(found, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("batch", "measured", "computed"), [(1, 242.4, 230), (16, 2111, 2177), (64, 5569, 5601)])
def test_one_overhead_constant_gives_three_measured_batches_of_lite(
    batch: int, measured: float, computed: float
) -> None:
    """SGLang issue 30247: Flash-Lite-FP8 on one H200, 1024 tokens in, 128 out."""
    speed = rates(gpu("H200"), "stock")
    plan = Deployment(LITE, "H200", speed, Layout(), precision("fp8-all"), context=1088).at(batch)
    assert plan.tokens_per_second_a_gpu == pytest.approx(measured, rel=0.07)
    assert plan.tokens_per_second_a_gpu == pytest.approx(computed, rel=0.005)


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [
        (1, 1.0),
        (2, 2 * 8 / (512 * (1 - (504 / 512) ** 2))),  # 16 rows, of two tokens that rarely share an expert
        (1024, 16.0),
    ],
)
def test_an_expert_has_the_rows_of_those_that_were_chosen(tokens: int, rows: float) -> None:
    costs = layer_costs(CHAT, Layout(), precision("bf16"), STOCK, Load(tokens, tokens, 100, 8))
    assert costs["experts"].rows == pytest.approx(rows, rel=1e-3)
    assert layer_costs(CHAT, Layout(), precision("bf16"), STOCK, Load(1, 1, 100, 0))["experts"].rows == 0


def test_attention_has_the_rate_of_its_context_where_that_is_known() -> None:
    known = replace(STOCK, attention_by_context=((100.0, 1e9), (400.0, 4e9)))
    assert [known.attention(context) for context in (1, 100, 200, 400, 1e6)] == pytest.approx([1e9, 1e9, 2e9, 4e9, 4e9])
    assert STOCK.attention(100) == STOCK.attention_per_second
    core = layer_costs(CHAT, Layout(), precision("bf16"), known, Load(1, 1, 200, 8))["attention_0_core"]
    assert timed("", replace(core, memory_bytes=0.0), known).seconds == pytest.approx(core.attention_operations / 2e9)


def test_a_step_of_many_tokens_has_another_fixed_cost() -> None:
    few = replace(STOCK, layer_seconds=1.0, few_rows=32, many_rows_layer_seconds=5.0, step_seconds=70.0)
    both = replace(few, layer_request_seconds=0.1, request_seconds=0.5)

    def step(speed: Rates, requests: int) -> StepTime:
        return step_time(CHAT, Layout(), precision("bf16"), speed, "none", Load(requests, requests, 10, 8))

    assert [step(few, n).overhead_seconds for n in (32, 33)] == [1.0, 5.0]
    assert [step(both, n).overhead_seconds for n in (32, 33)] == pytest.approx([4.2, 8.3])
    assert [step(both, n).engine_seconds for n in (1, 32)] == pytest.approx([70.5, 86.0])
    assert step(few, 32).seconds == pytest.approx(step(replace(few, step_seconds=0.0), 32).seconds + 70)


def test_an_operation_takes_as_long_as_its_slowest_resource() -> None:
    """Rates of 1 a second each, so that an amount is a time."""
    one = replace(
        STOCK,
        memory_bytes_per_second=1.0,
        products_per_second={"bf16": ((1.0, 1.0),), "fp8": ((1.0, 2.0),)},
        attention_per_second=1.0,
        inside_bytes_per_second=1.0,
        outside_bytes_per_second=1.0,
    )
    for cost, seconds, bound in (
        (Cost(memory_bytes=3, product_operations=2), 3, "bytes"),
        (Cost(memory_bytes=3, product_operations=4), 4, "operations"),
        (Cost(product_operations=4, precision="fp8"), 2, "operations"),
        (Cost(attention_operations=5, memory_bytes=4), 5, "operations"),
        (Cost(nvlink_bytes=6, network_bytes=5), 6, "NVLink"),
        (Cost(nvlink_bytes=6, network_bytes=7, latency_seconds=1), 8, "network"),
        (Cost(nvlink_bytes=1, latency_seconds=2), 3, "latency"),
    ):
        found = timed("x", cost, one)
        assert (found.seconds, found.bound) == (seconds, bound)


def test_products_between_two_measured_numbers_of_rows_are_between() -> None:
    speed = replace(STOCK, products_per_second={"bf16": ((1.0, 10.0), (8.0, 80.0), (64.0, 160.0))})
    assert [speed.products("bf16", rows) for rows in (0.5, 1, 8, 64, 512)] == [10, 10, 80, 160, 160]
    assert 10 < speed.products("bf16", 2) < 80 < speed.products("bf16", 20) < 160


def test_costs_of_a_layer_worked_out_by_hand() -> None:
    """192 rows on each of 128 ranks, which read every expert that any of 24,576 tokens chose: all four of each."""
    load = Load(96, 192, 5000, 8)
    costs = layer_costs(CHAT, Layout(1, 128, 128), precision("fp8"), replace(STOCK, has_imbalance=False), load)
    assert costs["dispatch"].network_bytes + costs["dispatch"].nvlink_bytes == pytest.approx(192 * 8 * 6144 * 127 / 128)
    assert costs["dispatch"].network_bytes == pytest.approx(192 * 8 * 6144 * 120 / 128)
    assert costs["combine"].network_bytes == pytest.approx(2 * costs["dispatch"].network_bytes)
    assert costs["experts"].memory_bytes == pytest.approx(4 * 37_748_736, rel=1e-3)
    assert costs["experts"].product_operations == 2 * 37_748_736 * 192 * 8
    assert costs["attention_0_core"].memory_bytes == 96 * 5000 * 1152
    assert costs["attention_0_core"].attention_operations == 2 * 192 * 5000 * 64 * (576 + 512)
    assert costs["identity"].memory_bytes == 192 * 6144 * 4
    assert "final_sum" not in costs


def test_tensor_parallel_ranks_sum_four_times_a_layer_and_send_no_tokens() -> None:
    costs = layer_costs(CHAT, Layout(8, 1, 8), precision("fp8"), STOCK, Load(1, 1, 5000, 8))
    assert {name for name in costs if "sum" in name} == {
        *("attention_0_sum", "dense_ffn_0_sum", "attention_1_sum", "final_sum")
    }
    assert costs["final_sum"].nvlink_bytes == pytest.approx(2 * 6144 * 2 * 7 / 8)
    assert "dispatch" not in costs
    assert costs["attention_0_core"].attention_operations == 2 * 5000 * 8 * (576 + 512)
    two_nodes = layer_costs(CHAT, Layout(16, 1, 16), precision("fp8"), STOCK, Load(1, 1, 5000, 8))
    assert two_nodes["final_sum"].network_bytes == pytest.approx(2 * 6144 * 2 / 2 / 8)


def test_few_tokens_touch_few_experts() -> None:
    """1 - (1 - 8/256)^B of Lite's experts."""
    for tokens, experts in ((1, 8), (16, 101.97), (64, 222.4)):
        costs = layer_costs(LITE, Layout(), precision("fp8-all"), STOCK, Load(tokens, tokens, 1, 8))
        assert costs["experts"].memory_bytes / (9_437_184 * (1 + 4 / 16384)) == pytest.approx(experts, rel=1e-3)


def test_the_busiest_of_random_ranks() -> None:
    assert random_imbalance(128, 1536) == pytest.approx(1.08, abs=0.005)
    assert random_imbalance(128, 128) == pytest.approx(1.28, abs=0.01)
    assert random_imbalance(1, 128) == 1


def test_recorded_routing_with_and_without_balance(tmp_path) -> None:  # type: ignore[no-untyped-def]
    layer = [8.0, 8, 1, 1, 1, 1, 2, 2]
    assert recorded_imbalance([layer], 4) == pytest.approx(16 / 6)
    assert recorded_imbalance([layer], 4, is_balanced=True) == pytest.approx(9 / 6)
    assert recorded_imbalance([layer, [3.0] * 8], 4) == pytest.approx((16 / 6 + 1) / 2)
    file = tmp_path / "counts.json"
    file.write_text("[[1, 2], [3, 4]]")
    assert read_counts(file) == [[1, 2], [3, 4]]
    file.write_text('{"logical_count": [[1, 2], [3, 4]]}')
    assert read_counts(file) == [[1, 2], [3, 4]], "as SGLang has it"
    file.write_text('{"layer": [1]}')
    with pytest.raises(ValueError, match="a list of layers"):
        read_counts(file)
    with pytest.raises(ValueError, match="8 experts, which 3 ranks do not divide"):
        recorded_imbalance([layer], 3)


def test_tokens_a_step_of_a_chain_of_drafts() -> None:
    assert Drafts().tokens_a_step == 1
    assert Drafts(1, 0.8).tokens_a_step == pytest.approx(1.8)
    assert Drafts(3, 0.5).tokens_a_step == pytest.approx(1.875)
    gate = Drafts(3, 0.8, has_gate=True)
    assert gate.rows == pytest.approx(1 + 3 * 0.63)
    assert gate.tokens_a_step == pytest.approx((1 + 0.8 + 0.64 + 0.512) * 2.10 / 2.12)
    with pytest.raises(ValueError, match=r"acceptance 1\.5, wanted 0 to 1"):
        Drafts(1, 1.5)


def test_overlap_within_a_batch_needs_a_shortcut() -> None:
    with pytest.raises(ValueError, match="needs a shortcut beside the experts, which DeepSeek-V3 has not"):
        schedule(model("deepseek-v3"), "single-batch")
    with pytest.raises(ValueError, match="overlap: 'all', wanted one of none"):
        schedule(CHAT, "all")


def test_two_batches_read_weights_twice() -> None:
    args = (CHAT, Layout(1, 128, 128), precision("fp8"))
    once = rates(gpu("H800"), "peaks")
    load = Load(2, 2, 1, 8)
    twice = step_time(*args, once, "two-batches", load).layer_seconds
    assert twice > 1.5 * step_time(*args, replace(once, splits_batches=False), "two-batches", load).layer_seconds


# -- properties ---------------------------------------------------------------------------------

LAYOUTS = st.sampled_from([each for gpus in (1, 8, 16, 64) for each in layouts(CHAT, gpus)])
OVERLAPS = st.sampled_from(["none", "two-batches", "single-batch"])
SETS = st.sampled_from(sets())
LOADS = st.builds(
    lambda requests, drafts, context: Load(requests, requests * (1 + drafts), context, 8.0),
    st.floats(1, 512),
    st.integers(0, 3),
    st.floats(1, 131072),
)


@given(LAYOUTS, OVERLAPS, SETS, LOADS, st.floats(1, 4), st.floats(1, 4))
def test_more_requests_or_a_longer_context_are_never_faster(
    layout: Layout, overlap: str, name: str, load: Load, requests: float, context: float
) -> None:
    speed = rates(gpu("H800"), name)
    # A busiest rank comes closer to the mean with more rows, so that its time alone could be less than in proportion.
    args = (CHAT, layout, precision("fp8"), speed, overlap)
    before = step_time(*args, load).seconds
    more = replace(load, requests=load.requests * requests, rows=load.rows * requests)
    assert step_time(*args, more).seconds >= before * (1 - 1e-9)
    assert step_time(*args, replace(load, context=load.context * context)).seconds >= before * (1 - 1e-9)


@given(LAYOUTS, OVERLAPS, SETS, LOADS, st.floats(0.1, 1))
def test_slower_memory_or_links_are_never_faster(
    layout: Layout, overlap: str, name: str, load: Load, share: float
) -> None:
    speed = rates(gpu("H800"), name)
    before = step_time(CHAT, layout, precision("fp8"), speed, overlap, load).seconds
    for field in ("memory_bytes_per_second", "inside_bytes_per_second", "outside_bytes_per_second"):
        slower = replace(speed, **{field: getattr(speed, field) * share})  # type: ignore[arg-type]
        assert step_time(CHAT, layout, precision("fp8"), slower, overlap, load).seconds >= before * (1 - 1e-9)


@given(LAYOUTS, SETS, LOADS)
def test_overlap_is_between_the_sum_of_its_parts_and_the_longest(layout: Layout, name: str, load: Load) -> None:
    speed = rates(gpu("H800"), name)
    args = (CHAT, layout, precision("fp8"), speed)
    overlapped = step_time(*args, "single-batch", load)
    assert overlapped.seconds <= step_time(*args, "none", load).seconds * (1 + 1e-9)
    for stage in overlapped.stages:
        times = [sum(each.seconds for each in track) for track in stage.tracks]
        assert max(times) * (1 - 1e-9) <= stage.seconds <= sum(times) * (1 + 1e-9)


@given(LAYOUTS, OVERLAPS, SETS, LOADS)
def test_everything_twice_as_fast_takes_half_the_time(layout: Layout, overlap: str, name: str, load: Load) -> None:
    speed = without_fixed_costs(rates(gpu("H800"), name))
    args = (CHAT, layout, precision("fp8"))
    fast = replace(
        speed,
        memory_bytes_per_second=2 * speed.memory_bytes_per_second,
        products_per_second={
            each: tuple((rows, 2 * rate) for rows, rate in points) for each, points in speed.products_per_second.items()
        },
        attention_per_second=2 * speed.attention_per_second,
        inside_bytes_per_second=2 * speed.inside_bytes_per_second,
        outside_bytes_per_second=2 * speed.outside_bytes_per_second,
    )
    halved = step_time(*args, fast, overlap, load).seconds
    assert halved == pytest.approx(step_time(*args, speed, overlap, load).seconds / 2, rel=1e-9)


def without_fixed_costs(speed: Rates) -> Rates:
    return replace(speed, layer_seconds=0.0, has_latency=False)


@given(st.floats(0, 12), LOADS)
def test_all_to_all_and_experts_are_in_proportion_to_ffn_experts(experts: float, load: Load) -> None:
    speed = rates(gpu("H800"), "report")
    args = (CHAT, Layout(1, 128, 128), precision("fp8"), speed)
    some, all_ = (layer_costs(*args, replace(load, ffn_experts=k)) for k in (experts, 12.0))
    for name, field in (
        ("dispatch", "network_bytes"),
        ("combine", "network_bytes"),
        ("experts", "product_operations"),
    ):
        assert getattr(some[name], field) == pytest.approx(getattr(all_[name], field) * experts / 12)


@given(st.sampled_from([16, 32, 64, 128, 256, 512]), LOADS)
def test_more_expert_parallel_ranks_change_experts_and_memory_alone(ranks: int, load: Load) -> None:
    """In the report's theory, in which the link is the same for all numbers of ranks."""
    speed = rates(gpu("H800"), "report")
    few, many = (layer_costs(CHAT, Layout(1, each, each), precision("fp8"), speed, load) for each in (16, ranks))
    assert {name for name in few if few[name] != many[name]} <= {"experts"}
    assert many["experts"].product_operations == pytest.approx(few["experts"].product_operations)
    assert many["experts"].memory_bytes <= few["experts"].memory_bytes
    memories = [deployment(layout=Layout(1, each, each)).memory.weights.total for each in (16, ranks)]
    assert memories[1] <= memories[0]


@given(st.floats(0, 2), st.floats(1, 256))
def test_a_busier_rank_is_never_faster(more: float, requests: float) -> None:
    even, uneven = (deployment(imbalance=each).at(requests).step.seconds for each in (1.0, 1.0 + more))
    assert even <= uneven
