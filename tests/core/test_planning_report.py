"""The report's tables, and answers of docs/plan.md that follow from its theory, within what arithmetic allows."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import replace

import pytest

from longcat_core.planning.costs import layer_costs
from longcat_core.planning.drafts import Drafts
from longcat_core.planning.hardware import gpu
from longcat_core.planning.layout import Layout
from longcat_core.planning.plan import Deployment, for_users
from longcat_core.planning.rates import rates
from longcat_core.planning.report_tables import measured, rates_of_table_6, theory

ROWS, ASSUMPTIONS = theory()
LONGCAT = ROWS[0].plan.deployment


def test_bytes_and_operations_of_the_theory_worked_out_by_hand() -> None:
    """Microseconds: dispatch, combine at 40 GB/s; experts by operations at 1979 TFLOPS, and by bytes at 3.35 TB/s."""
    wanted = [(235.93, 471.86, 58.60, 45.07), (275.25, 550.50, 76.91, 39.44), (157.29, 314.57, 29.30, 5.63)]
    for row, numbers in zip(ROWS, wanted, strict=True):
        plan = row.plan.deployment
        costs = layer_costs(plan.model, plan.layout, plan.precision, plan.rates, plan.load(row.plan.requests))
        found = (
            costs["dispatch"].network_bytes / 40e9,
            costs["combine"].network_bytes / 40e9,
            costs["experts"].product_operations / 1979e12,
            costs["experts"].memory_bytes / (1 + 4 / 16384) / 3.35e12,
        )
        assert [each * 1e6 for each in found] == pytest.approx(numbers, rel=1e-3)


def test_every_stage_of_table_7_is_within_two_percent() -> None:
    stages = [each for row in ROWS for each in row.comparisons if each.unit == "us"]
    assert len(stages) == 12
    for each in stages:
        assert abs(each.error) < 0.02, each


def test_the_time_of_a_token_is_within_one_percent() -> None:
    times = [each for row in ROWS for each in row.comparisons if each.unit == "ms"]
    assert [round(each.computed, 2) for each in times] == [16.01, 30.07, 26.17]
    assert all(abs(each.error) < 0.01 for each in times)


def test_prices_round_to_the_printed_ones() -> None:
    prices = [each for row in ROWS for each in row.comparisons if each.unit == "dollars"]
    assert [round(each.computed, 2) for each in prices] == [each.printed for each in prices] == [0.09, 0.17, 0.15]
    assert [round(each.computed, 4) for each in prices] == [0.0927, 0.1740, 0.1515]


def test_without_adding_zero_experts_the_moe_is_2_3_percent_short() -> None:
    omitted = LONGCAT.rates.omitted | {"identity"}
    plan = replace(LONGCAT, rates=replace(LONGCAT.rates, omitted=omitted)).at(96)
    assert stage(plan, "MoE") * 1e6 == pytest.approx(58.60, rel=1e-3)
    assert plan.seconds_a_token * 1e3 == pytest.approx(15.99, abs=0.005)
    assert plan.dollars_a_million_tokens == pytest.approx(0.0925, abs=5e-5)


def stage(plan: object, name: str) -> float:
    return next(each.seconds for each in plan.step.stages if each.name == name)  # type: ignore[attr-defined]


def test_at_the_context_of_table_6_attention_is_outside_two_percent() -> None:
    rows, _ = theory(context=5000)
    attention = [row.comparisons[0] for row in rows]
    assert [round(each.computed, 1) for each in attention] == [256.6, 461.0, 307.3]
    assert all(abs(each.error) > 0.02 for each in attention)


def test_every_assumption_of_a_preset_is_stated_or_inferred() -> None:
    for assumptions in (ASSUMPTIONS, measured()[1]):
        assert {each.known for each in assumptions} == {"stated", "inferred"}
        assert len({each.what for each in assumptions}) == len(assumptions)


@pytest.mark.parametrize(
    ("name", "errors"),
    [
        ("meituan", [-2.5, 3.8, -0.8, -4.8, 1.4]),
        ("meituan-overlapped", [-4.9, 5.9, -5.4, -6.3, -5.6]),
        ("meituan-serial", [0.7, 1.5, -0.2, -1.8, -1.5]),
    ],
)
def test_one_set_of_rates_gives_five_measured_rows(name: str, errors: list[float]) -> None:
    assert name in rates_of_table_6()
    fitted = [row.comparisons[0] for row in measured(name)[0]][:5]
    assert all(abs(each.error) < 0.07 for each in fitted)
    assert [round(100 * each.error, 1) for each in fitted] == errors


def test_the_set_without_overlap_fits_best_so_the_rows_tell_nothing_of_overlap() -> None:
    worst = {name: max(abs(row.comparisons[0].error) for row in measured(name)[0][:5]) for name in rates_of_table_6()}
    assert min(worst, key=worst.__getitem__) == "meituan-serial"
    assert worst["meituan-serial"] < 0.02


def test_a_batch_that_was_not_fitted_is_near_the_time_that_was_measured() -> None:
    for name in rates_of_table_6():
        held_out = measured(name)[0][5].comparisons[0]
        assert (held_out.printed, held_out.unit) == (26, "ms")
        assert 26 <= held_out.computed < 28


# -- answers ------------------------------------------------------------------------------------


def of_set(name: str, **changes: object) -> Deployment:
    context = 5120 if name == "report" else 5000
    found = replace(LONGCAT, rates=rates(gpu("H800"), name), context=context)
    return replace(found, **changes)  # type: ignore[arg-type]


def gain(name: str, requests: int) -> float:
    """Of one draft a step, accepted with 0.8."""
    none, one = (of_set(name, drafts=drafts).at(requests) for drafts in (Drafts(), Drafts(1, 0.8)))
    return one.tokens_per_second_a_user / none.tokens_per_second_a_user


def test_what_a_draft_brings_at_batch_1_and_96() -> None:
    assert gain("report", 1) == pytest.approx(1.73, abs=0.005)
    assert gain("report", 96) == pytest.approx(1.09, abs=0.005)
    assert gain("meituan", 1) == pytest.approx(1.68, abs=0.005)
    assert gain("meituan", 96) == pytest.approx(1.24, abs=0.005)
    assert gain("meituan-overlapped", 96) == pytest.approx(1.08, abs=0.005)


def test_without_drafts_attention_is_bound_by_memory() -> None:
    plan = of_set("report", drafts=Drafts()).at(96)
    assert plan.step.layer_seconds * 1e6 == pytest.approx(622, rel=2e-3)
    assert plan.step.seconds * 1e3 == pytest.approx(17.42, rel=2e-3)
    cores = {drafts.count: core(of_set("report", drafts=drafts)) for drafts in (Drafts(), Drafts(1, 0.8))}
    assert cores == {0: "bytes", 1: "operations"}


def core(deployment: Deployment) -> str:
    (track,) = deployment.at(96).step.stages[0].tracks
    return next(each.bound for each in track if each.name == "attention_0_core")


@pytest.mark.parametrize(
    ("requests", "milliseconds"),
    [(96, [20.71, 17.90, 16.50, 16.01, 16.01]), (8, [7.64, 4.83, 3.43, 2.73, 2.38])],
)
def test_320_ranks_buy_memory_and_not_speed(requests: int, milliseconds: list[float]) -> None:
    """With zero experts' tokens added, 0.02 ms at 96 requests; 2 experts a rank on 320, as 512 are no multiple."""
    plans = [of_set("report", layout=Layout(1, ranks, ranks)) for ranks in (16, 32, 64, 128, 320)]
    assert [round(plan.at(requests).seconds_a_token * 1e3, 2) for plan in plans] == milliseconds
    assert plans[-1].memory.weights.total < plans[-2].memory.weights.total


def test_the_theory_hides_more_than_an_all_to_all_of_8_requests_is_long() -> None:
    """Dense FFNs and the second attention take longer than dispatch and combine: the theory leaves them out anyway."""
    theory_, whole = (of_set(name).at(8).seconds_a_token * 1e3 for name in ("report", "peaks"))
    assert theory_ == pytest.approx(2.73, abs=0.01)
    assert whole > 1.8 * theory_


@pytest.mark.parametrize(("dense", "by_memory"), [("bf16", 87), ("fp8", 127)])
@pytest.mark.parametrize("name", ["meituan", "meituan-overlapped"])
def test_users_at_20_tokens_a_second_are_bound_by_memory(name: str, dense: str, by_memory: int) -> None:
    """Memory ends at 89 and 128 requests without the MTP layer's own cache, which is 1,152 bytes a token."""
    precision = replace(LONGCAT.precision, dense_ffns=dense, mtp=dense)
    deployment = of_set(name, precision=precision)
    choice = for_users(deployment, 20)
    assert choice.bound == "memory"
    assert choice.by_memory == choice.plan.requests == by_memory
    assert choice.by_time == pytest.approx(190, abs=10)
    assert choice.plan.tokens_per_second_a_user > 20
    room = deployment.memory.room_bytes / 64_512 / 5000
    assert room == pytest.approx({"bf16": 89, "fp8": 129}[dense], abs=0.6)
