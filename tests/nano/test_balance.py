"""What steers LongCat-Nano's router: the balance loss by hand, and the controllers in a toy of a router."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from examples.nano.balance import BiasController, Watch, device_balance_loss
from examples.nano.settings import PRESETS, Settings
from longcat_core.layers.routing import Routing, expert_rows, route
from longcat_core.reference import LongcatForCausalLM

TINY = PRESETS["tiny"]
MODEL = TINY.model
"""8 FFN and 4 zero experts, 6 of them a token, 4 of the 6 to be FFN experts."""


def test_the_balance_loss_is_the_reports_formula() -> None:
    # Two tokens, four FFN experts on two devices and two zero experts; top 3, of which 2 are to be FFN experts.
    scores = torch.tensor([[0.30, 0.10, 0.20, 0.10, 0.20, 0.10], [0.50, 0.10, 0.10, 0.10, 0.15, 0.05]])
    ids = torch.tensor([[0, 2, -1], [0, 1, -1]], dtype=torch.int32)
    first_device, second_device, zero = 2 / (2 * 2) * 3, 2 / (2 * 2) * 1, 1 / (1 * 2) * 2
    wanted = first_device * 0.50 + second_device * 0.25 + zero * 0.25
    found = device_balance_loss(scores, ids, n_routed_experts=4, devices=2, target=2.0)
    assert float(found) == pytest.approx(wanted)


def test_the_balance_loss_of_an_even_load_is_one() -> None:
    scores = torch.rand(8, 12).softmax(dim=-1)
    ids = torch.stack([torch.tensor([t, t + 1, t + 2, t + 3, -1, -1]) % 8 for t in range(8)])
    ids[:, 4:] = -1
    found = device_balance_loss(scores, ids, n_routed_experts=8, devices=4, target=4.0)
    assert float(found) == pytest.approx(1.0)


def test_the_gradient_of_the_balance_loss_lowers_the_scores_of_a_busy_device() -> None:
    logits = torch.zeros(4, 6, requires_grad=True)
    ids = torch.tensor([[0, 1, -1]] * 4)
    scores = logits.softmax(dim=-1)
    device_balance_loss(scores, ids, n_routed_experts=4, devices=2, target=2.0).backward()
    assert logits.grad is not None
    assert (logits.grad[:, :2] > 0).all()
    assert (logits.grad[:, 2:4] < 0).all()


# -- the controllers -----------------------------------------------------------------------------------


def controlled(settings: Settings, steps: int, seed: int, drift: float) -> tuple[list[Tensor], Tensor]:
    """A router of two layers whose logits favour some experts, and wander; returns the rows of every step, int64
    [2, N], of 512 tokens, and the last bias."""
    generator = torch.Generator().manual_seed(seed)
    controller = BiasController(settings, layers=2)
    width = MODEL.n_routed_experts + MODEL.zero_expert_num
    favour = torch.randn(2, 1, width, generator=generator)
    bias, seen = torch.zeros(2, width), []
    for _ in range(steps):
        favour = favour + drift * torch.randn(2, 1, width, generator=generator)
        logits = favour + torch.randn(2, 512, width, generator=generator)
        ids = [routed(each, its).ids for each, its in zip(logits, bias, strict=True)]
        rows = torch.stack([expert_rows(each, MODEL.n_routed_experts) for each in ids])
        bias = controller.update(rows, 512, rate=1.0)
        seen.append(rows)
    return seen, bias


def routed(logits: Tensor, bias: Tensor) -> Routing:
    return route(logits, bias, n_routed_experts=8, top_k=6, routed_scaling_factor=1.0)


@pytest.mark.parametrize("target", [3.0, 4.0, 5.0])
def test_the_controller_holds_the_mean_of_ffn_experts_at_its_target(target: float) -> None:
    settings = TINY.changed({"zero_experts.target": target})
    seen, bias = controlled(settings, steps=400, seed=1, drift=0.02)
    means = torch.stack(seen[200:]).double().sum(dim=2).mean(dim=0) / 512
    assert (means / target - 1).abs().max() < 0.01, f"{target=}, {means=}"
    assert (bias[:, MODEL.n_routed_experts :] == 0).all()


def test_without_the_controllers_the_bias_stays_zero() -> None:
    settings = TINY.changed({"zero_experts.controlled": False, "bias_balance.enabled": False})
    _, bias = controlled(settings, steps=5, seed=1, drift=0.0)
    assert not bias.any()


def test_the_balance_update_evens_out_ffn_experts_and_leaves_the_mean_to_the_controller() -> None:
    seen, bias = controlled(TINY.changed({"zero_experts.controlled": False}), steps=600, seed=2, drift=0.0)
    before, after = (torch.stack(part).double().mean(dim=0) for part in (seen[:5], seen[-50:]))
    imbalance = [(rows.amax(dim=1) / rows.mean(dim=1)).max() for rows in (before, after)]
    assert imbalance[0] > 1.3
    assert imbalance[1] < 1.05
    assert bias[:, : MODEL.n_routed_experts].mean(dim=1).abs().max() < 1e-6


def test_at_rate_zero_one_batch_no_longer_moves_the_bias() -> None:
    controller = BiasController(TINY, layers=1)
    controller.update(torch.full((1, 8), 100), 512, rate=1.0)
    biases = [controller.update(torch.full((1, 8), rows), 512, rate=0.0) for rows in (10, 500)]
    assert torch.equal(*biases)
    assert biases[0][0, 0] > 0


def test_a_watch_sees_every_layer_while_it_lasts_and_no_loss_without_gradients() -> None:
    model, ids = LongcatForCausalLM(MODEL.config(), with_mtp=False), torch.zeros(2, 5, dtype=torch.int64)
    with Watch(model, TINY) as watch:
        model(ids)
        with torch.no_grad():
            model(ids)
    model(ids)
    seen = watch.take()
    assert [each.loss is None for each in seen] == [False, False, True, True]
    assert watch.take() == []
