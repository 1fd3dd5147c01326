"""The dial: a step worked by hand, where it settles, and how it gets there with routers of many kinds."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.dial import GAIN, HALF_WEIGHT, Dial, DialledRouters, breaking_points, obstacles_to_dial, settled_bias
from longcat_core.layers.routing import route
from longcat_core.reference import LongcatForCausalLM
from longcat_core.target_by_queue import PATIENCE, PLACES
from longcat_nano import CHECKPOINT
from tests.cases import CASES, DEFAULT
from tests.dialled import CPU, Traffic, drawn, held, recorded

CHAT = replace(DEFAULT, n_routed_experts=512, zero_expert_num=256, moe_topk=12)
IDS = torch.tensor([[[0, 1, -1, -1], [0, 2, 3, 5], [7, 7, 7, 7]], [[-1, -1, -1, -1], [-1, 2, -1, 5], [7, 7, 7, 7]]])
"""Two layers, of which the third row only pads the step: 3 and 1 FFN experts a token."""
IS_REAL = torch.tensor([1, 1, 0])


def dial_at(target: float, config: LongcatConfig = DEFAULT, layers: int = 2) -> Dial:
    return Dial(config, target, layers, CPU)


# -- a step ------------------------------------------------------------------------------------------------------------


def test_a_step_worked_by_hand() -> None:
    dial = dial_at(2.0)
    dial.end_step(IDS.int(), IS_REAL)
    moved = GAIN * 2 / (2 + HALF_WEIGHT) / DEFAULT.moe_topk
    torch.testing.assert_close(dial.settings, torch.tensor([moved, -moved]))
    torch.testing.assert_close(dial.bias(), torch.tensor([math.sinh(moved), -math.sinh(moved)]) / DEFAULT.num_experts)
    dial.end_step(IDS.int(), IS_REAL)
    torch.testing.assert_close(dial.settings, torch.tensor([2 * moved, -2 * moved]))


def test_the_smallest_steps_are_not_rounded_away_where_a_model_is_in_bf16() -> None:
    """Engines build a model with its dtype as the default."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        dial = dial_at(2.0)
    finally:
        torch.set_default_dtype(default)
    dial.settings.fill_(0.75)
    for _ in range(10):
        dial.end_step(IDS[:, :1].int(), IS_REAL[:1])
    assert dial.settings.dtype == torch.float32
    moved = dial.settings - 0.75
    alone = dial_at(2.0)
    for _ in range(10):
        alone.end_step(IDS[:, :1].int(), IS_REAL[:1])
    assert alone.settings.any()
    torch.testing.assert_close(moved, alone.settings, rtol=1e-3, atol=1e-6)


def test_a_step_without_tokens_moves_nothing() -> None:
    dial = dial_at(2.0)
    dial.end_step(IDS.int(), torch.zeros(3, dtype=torch.int64))
    dial.end_step(IDS[:, :0].int(), IS_REAL[:0])
    assert not dial.settings.any()


def test_the_bias_is_of_zero_experts_and_the_published_one_stays() -> None:
    dial, experts = dial_at(2.0), DEFAULT.num_experts
    dial.settings.copy_(torch.tensor([0.5, -0.25]))
    published = [torch.full((experts,), 0.01), torch.full((experts,), 0.02)]
    chosen_by = [torch.full((experts,), math.nan) for _ in published]
    dial.begin_step(published, chosen_by)
    for own, layer, bias in zip((0.01, 0.02), chosen_by, dial.bias(), strict=True):
        torch.testing.assert_close(layer[: DEFAULT.n_routed_experts], torch.full((DEFAULT.n_routed_experts,), own))
        zero = layer[DEFAULT.n_routed_experts :]
        torch.testing.assert_close(zero, torch.full_like(zero, own) + bias)
    assert published[0].unique().tolist() == [pytest.approx(0.01)]


def test_a_compiled_step_moves_the_settings_each_time_it_runs() -> None:
    """As in an engine that captures its steps; and ranks that chose the same have the same bits."""
    first, second = dial_at(2.5), dial_at(2.5)
    compiled = torch.compile(second.end_step, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        first.end_step(IDS.int(), IS_REAL)
        compiled(IDS.int(), IS_REAL)
        assert first.settings.any()
        assert torch.equal(first.settings, second.settings)


def test_another_target_is_held_from_the_next_step_on_by_a_compiled_one_too() -> None:
    """From where the settings are. A captured step reads the target on the device."""
    dial, alone = dial_at(2.0), dial_at(1.0)
    compiled = torch.compile(dial.end_step, backend="aot_eager", fullgraph=True)
    compiled(IDS.int(), IS_REAL)
    before = dial.settings.clone()
    dial.turn(1.0)
    compiled(IDS.int(), IS_REAL)
    alone.end_step(IDS.int(), IS_REAL)
    torch.testing.assert_close(dial.settings - before, alone.settings)
    assert dial.target == 1.0


def test_between_two_bounds_a_compiled_step_holds_what_the_queue_asks_for() -> None:
    router = SimpleNamespace(e_score_correction_bias=torch.zeros(DEFAULT.num_experts))
    dialled, turns = DialledRouters(DEFAULT, [1.0, 3.0], [router], CPU, full_queue=4), list[float]()
    dial, alone = dialled.dial, dial_at(1.0, layers=1)
    assert (dial.target, dial.bounds) == (3, (1, 3))
    compiled = torch.compile(dial.end_step, backend="aot_eager", fullgraph=True)
    compiled(IDS[:1].int(), IS_REAL)
    for _ in range(PLACES * PATIENCE):
        dialled.follow_queue(4, most_running=100, before_turning=lambda: turns.append(dial.target))
    assert dial.target == 1
    assert turns == [3 - 2 * place / PLACES for place in range(PLACES)], "asked before each turn, and else not"
    before = dial.settings.clone()
    compiled(IDS[:1].int(), IS_REAL)
    alone.end_step(IDS[:1].int(), IS_REAL)
    torch.testing.assert_close(dial.settings - before, alone.settings)


def test_two_bounds_begin_to_follow_the_queue_and_a_number_ends_it() -> None:
    router = SimpleNamespace(e_score_correction_bias=torch.zeros(DEFAULT.num_experts))
    dialled = DialledRouters(DEFAULT, 2.5, [router], CPU)

    def after_a_full_queue() -> float:
        for _ in range(PLACES * PATIENCE):
            dialled.follow_queue(100, most_running=100)
        return dialled.dial.target

    assert after_a_full_queue() == 2.5
    dialled.dial.turn(["3", 1])
    assert dialled.dial.target == 3
    assert after_a_full_queue() == 1
    dialled.dial.reset()
    assert (dialled.dial.target, dialled.dial.bounds) == (1, (1, 3))
    dialled.dial.turn(2)
    assert (after_a_full_queue(), dialled.dial.bounds) == (2, None)


@pytest.mark.parametrize("target", [(1, 4), (0, 1), [2], [1, 2, 3], [1, "many"], [[1], 2]])
def test_bounds_that_no_bias_holds_leave_the_dial_as_it_was(target: object) -> None:
    dial = dial_at(2.5)
    with pytest.raises(ValueError, match=r"a dial at .*wanted "):
        dial.turn(target)
    assert (dial.target, dial.bounds) == (2.5, None)


def test_a_target_that_no_bias_holds_leaves_the_dial_as_it_was() -> None:
    dial, alone = dial_at(2.5), dial_at(2.5)
    for target in (0.0, 4.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="wanted more than 0 and less than 4"):
            dial.turn(target)
    for each in (dial, alone):
        each.end_step(IDS.int(), IS_REAL)
    assert dial.target == 2.5
    assert torch.equal(dial.settings, alone.settings)


def test_a_reset_begins_with_the_model_as_published_at_the_same_target() -> None:
    dial = dial_at(2.5)
    dial.end_step(IDS.int(), IS_REAL)
    moved = dial.settings.clone()
    dial.reset()
    assert dial.biases() == [0, 0]
    dial.end_step(IDS.int(), IS_REAL)
    assert torch.equal(dial.settings, moved)


def test_no_bias_is_more_than_a_score_can_be() -> None:
    dial = dial_at(1.0)
    for _ in range(10_000):
        dial.end_step(torch.zeros(2, 4096, 4, dtype=torch.int32), torch.ones(4096, dtype=torch.int64))
    torch.testing.assert_close(dial.bias(), torch.ones(2))


@pytest.mark.parametrize(
    ("config", "target", "obstacle"),
    [
        (DEFAULT, 0.5, None),
        (DEFAULT, 0, "0, wanted more than 0 and less than 4, the FFN experts that a token can have"),
        (DEFAULT, 4, "4, wanted more than 0 and less than 4"),
        (CASES["odd_counts"].config, 3.5, "3.5, wanted more than 0 and less than 3"),
        (CASES["topk_beyond_ffn_experts"].config, 3, "3, wanted more than 0 and less than 3"),
        (replace(DEFAULT, zero_expert_num=3), 1, "1, wanted more than 1 and less than 4"),
        (CASES["no_zero_experts"].config, 3, "this model has no zero experts to choose instead"),
    ],
)
def test_what_no_bias_holds_is_refused(config: LongcatConfig, target: float, obstacle: str | None) -> None:
    found = obstacles_to_dial(config, target)
    assert len(found) == (obstacle is not None)
    if obstacle is not None:
        assert found[0].startswith(obstacle)
        with pytest.raises(ValueError, match="a dial at "):
            dial_at(target, config)


# -- where it settles --------------------------------------------------------------------------------------------------


def shaped(n_routed_experts: int, zero_expert_num: int, moe_topk: int) -> LongcatConfig:
    return replace(DEFAULT, n_routed_experts=n_routed_experts, zero_expert_num=zero_expert_num, moe_topk=moe_topk)


@pytest.mark.parametrize("config", [DEFAULT, shaped(3, 9, 6), shaped(9, 3, 6), shaped(3, 3, 6), shaped(40, 20, 12)])
def test_breaking_points_say_what_is_chosen_at_any_bias(config: LongcatConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, published, n = (
        torch.randn(200, config.num_experts, generator=generator),
        torch.randn(config.num_experts, generator=generator),
        config.n_routed_experts,
    )
    published *= 0.5 / config.num_experts
    points = breaking_points(logits.softmax(dim=-1), published, n, config.moe_topk)
    assert bool((points[:, :-1] >= points[:, 1:]).all()), "greatest first"
    for bias in (-2.0, -0.1, -0.01, 0.0, 0.003, 0.05, 2.0):
        by = published.clone()
        by[n:] += bias
        routing = route(logits, by, n_routed_experts=n, top_k=config.moe_topk, routed_scaling_factor=1.0)
        assert torch.equal((points > bias).sum(dim=-1), (routing.ids >= 0).sum(dim=-1))


def test_a_settled_bias_has_the_mean_that_is_wanted() -> None:
    traffic = drawn(CHAT, spread=1.0)
    for target in (0.5, 3.0, 8.0, 11.5):
        biases = torch.tensor([settled_bias(points, target) for points in traffic.points])
        assert traffic.mean(biases).tolist() == pytest.approx([target] * 2, abs=1 / 4096)


def test_a_mean_that_no_bias_holds_for_some_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a mean of 0\.3 FFN experts: no bias of the zero experts holds it"):
        settled_bias(drawn(DEFAULT, spread=1.0, tokens=1).points[0], 0.3)


# -- how it gets there -------------------------------------------------------------------------------------------------

STEPS, TOKENS = 200, 256
WITHIN, CHANCE, OVERSHOOT = 0.01, 0.02, 0.05
SETTLED = 20
"""Steps whose mean is looked at, as a step's tokens are chance."""


def assert_arrives(means: Tensor, target: float) -> None:
    """means: [steps, layers], the first before anything has moved. None goes beyond the target by more than 5 % of its
    way, or 2 % of the target if it has hardly any; and all are within 1 % of it at the end."""
    way, smooth = target - means[0], means.unfold(0, SETTLED, 1).mean(dim=-1)
    beyond = ((smooth - target) * way.sign()).amax(dim=0)
    allowed = torch.maximum(OVERSHOOT * way.abs(), torch.full_like(way, CHANCE * target))
    assert bool((beyond <= allowed).all()), f"{beyond=}, {allowed=}"
    assert smooth[-1].tolist() == pytest.approx([target] * means.shape[1], rel=WITHIN)


@pytest.mark.parametrize("spread", [0.25, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("target", [4.0, 6.0, 9.0])
def test_it_arrives_without_going_beyond_whatever_the_routers_scores_are(target: float, spread: float) -> None:
    """Routers of LongCat-Flash-Chat's width, which take about 8, with nearly equal scores up to a few that have all."""
    means = held(dial_at(target, CHAT), drawn(CHAT, spread), STEPS, TOKENS, torch.Generator().manual_seed(1))
    assert_arrives(means, target)


@pytest.fixture(scope="module")
def nano() -> tuple[LongcatConfig, dict[str, Traffic]]:
    """LongCat-Nano's routers on two kinds of text: Python, and prose that it was not trained for."""
    tokenizer, model = (
        Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")),
        LongcatForCausalLM.from_checkpoint(CHECKPOINT),
    )
    files = {"python": Path(argparse.__file__), "prose": Path(__file__).parents[2] / "LICENSE"}
    found = {}
    for name, file in files.items():
        tokens = tokenizer.encode(file.read_text(encoding="utf-8")).ids[:4096]
        found[name] = recorded(model, torch.tensor(tokens[: len(tokens) // 256 * 256]).view(-1, 256))
    return model.config, found


@pytest.mark.parametrize("target", [2.0, 3.0, 5.0])
def test_on_nano_it_arrives_and_stays_when_the_traffic_changes(
    target: float, nano: tuple[LongcatConfig, dict[str, Traffic]]
) -> None:
    config, traffic = nano
    dial, generator = dial_at(target, config, config.num_layers), torch.Generator().manual_seed(0)
    for name in ("python", "prose", "python"):
        assert_arrives(held(dial, traffic[name], STEPS, TOKENS, generator), target)
    published = [float(each.mean(torch.zeros(config.num_layers)).mean()) for each in traffic.values()]
    assert abs(published[0] - published[1]) > 0.2, "the traffic is another"


def test_steps_of_one_token_arrive_in_as_many_tokens(nano: tuple[LongcatConfig, dict[str, Traffic]]) -> None:
    """A lone request: the mean of one token is chance, so that it takes thousands, and no step moves much."""
    config, traffic = nano
    dial = dial_at(3.0, config, config.num_layers)
    means = held(dial, traffic["python"], 8000, 1, torch.Generator().manual_seed(0))
    assert means[-2000:].mean(dim=0).tolist() == pytest.approx([3.0] * config.num_layers, rel=0.02)
    assert float((means[1:] - means[:-1]).abs().max()) < 0.1
