"""An inspection tells what the router and the drafter do: counted in other ways, it comes out the same."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from longcat_core.drafting import gate as drafting
from longcat_core.inspection import held, inspect, routers
from longcat_core.reference import LongcatForCausalLM
from tests.cases import DEFAULT, drafting_tensors, published, write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LongcatForCausalLM:
    directory = write_checkpoint(tmp_path_factory.mktemp("inspected"), DEFAULT, drafting_tensors(DEFAULT))
    return LongcatForCausalLM.from_checkpoint(directory)


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(DEFAULT.vocab_size, (count,), generator=generator).tolist()


def test_a_token_takes_as_many_ffn_experts_as_the_others_are_busy(model: LongcatForCausalLM) -> None:
    found = inspect(model, tokens(50))
    assert found.ffn_experts.shape == (DEFAULT.num_layers, 50)
    assert found.load.shape == (DEFAULT.num_layers, DEFAULT.n_routed_experts)
    assert torch.equal(found.ffn_experts.sum(dim=1), found.load.sum(dim=1))
    assert len(found.ffn_experts.unique()) > 1, "the router treats tokens differently"


@torch.no_grad()
def test_zero_experts_are_not_counted(model: LongcatForCausalLM) -> None:
    """With all zero experts put out of the router's reach, each slot is an FFN expert's."""
    router = model.model.layers[1].mlp.router
    bias = router.e_score_correction_bias.clone()
    try:
        router.e_score_correction_bias[DEFAULT.n_routed_experts :] = -10
        found = inspect(model, tokens(20))
    finally:
        router.e_score_correction_bias.copy_(bias)
    assert (found.ffn_experts[1] == DEFAULT.moe_topk).all()
    assert (found.ffn_experts[0] < DEFAULT.moe_topk).any()


def test_activated_parameters_are_those_of_the_configuration(model: LongcatForCausalLM) -> None:
    found = inspect(model, tokens(20))
    spared = (DEFAULT.num_layers * DEFAULT.moe_topk - found.ffn_experts.sum(dim=0)) * DEFAULT.expert_parameters
    everything = DEFAULT.activated_parameters(DEFAULT.moe_topk)
    torch.testing.assert_close(found.activated_parameters(DEFAULT), everything - spared.double())


def test_drafts_along_the_models_own_text_are_those_that_an_engine_would_accept(model: LongcatForCausalLM) -> None:
    prompt = tokens(7)
    continuation = model.generate(prompt, 40)
    accepted = drafting.draft_chains(model, prompt, continuation, 1).accepted.bool()
    found = inspect(model, prompt + continuation)
    assert found.drafts is not None
    assert torch.equal(found.drafts[len(prompt) + 1 :], accepted)
    assert 0 < found.drafts[2:].sum() < len(found.drafts) - 2
    assert found.draft_acceptance() == pytest.approx(float(found.drafts[2:].float().mean()))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_first_two_places_have_no_draft(count: int, model: LongcatForCausalLM) -> None:
    found = inspect(model, tokens(count))
    assert found.drafts is not None
    assert len(found.drafts) == count
    assert not found.drafts[:2].any()
    assert (found.draft_acceptance() is None) == (count < 3)


def test_a_model_without_an_mtp_layer_has_no_drafts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, DEFAULT, published(DEFAULT, with_mtp=False))
    found = inspect(LongcatForCausalLM.from_checkpoint(tmp_path), tokens(5))
    assert found.drafts is None
    assert found.draft_acceptance() is None


@torch.no_grad()
def test_a_surprise_is_what_the_model_gave_the_token_before_it_came(model: LongcatForCausalLM) -> None:
    text = tokens(12)
    found = inspect(model, text)
    assert found.nats[0].isnan()
    for place in (1, 7, 11):
        chances = model(torch.tensor([text[:place]]))[0][0, -1].softmax(dim=-1)
        assert float(found.nats[place]) == pytest.approx(-math.log(float(chances[text[place]])), rel=1e-4)


def test_nothing_is_left_on_the_model(model: LongcatForCausalLM) -> None:
    inspect(model, tokens(5))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("count", [0, DEFAULT.max_position_embeddings + 1])
def test_a_text_that_does_not_fit_is_refused(count: int, model: LongcatForCausalLM) -> None:
    with pytest.raises(
        ValueError, match=f"{count} tokens, wanted 1 to .* context of {DEFAULT.max_position_embeddings}"
    ):
        inspect(model, tokens(count))


@torch.no_grad()
def test_a_mean_that_is_held_is_held_in_every_layer(model: LongcatForCausalLM) -> None:
    text, published = tokens(200), [router.e_score_correction_bias.clone() for router in routers(model)]
    as_published = inspect(model, text)
    for target in (1.0, 2.5):
        with held(model, target) as biases:
            found = inspect(model, text)
        assert found.ffn_experts.double().mean(dim=1).tolist() == pytest.approx([target] * 2, abs=1 / 200)
        assert not torch.equal(found.nats[1:], as_published.nats[1:])
        for router, bias in zip(routers(model), biases, strict=True):
            router.e_score_correction_bias[DEFAULT.n_routed_experts :] += bias
        again = inspect(model, text)
        for router, own in zip(routers(model), published, strict=True):
            router.e_score_correction_bias.copy_(own)
        assert torch.equal(again.ffn_experts, found.ffn_experts), "by that bias of the zero experts and nothing else"
    assert torch.equal(inspect(model, text).nats[1:], as_published.nats[1:]), "nothing is left on the model"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_mean_that_no_bias_holds_is_refused(model: LongcatForCausalLM) -> None:
    with pytest.raises(ValueError, match="a mean of FFN experts of 4, wanted more than 0 and less than 4"):
        held(model, 4).__enter__()
    with pytest.raises(ValueError, match=r"a mean of 0\.1 FFN experts: no bias"), held(model, 0.1):
        inspect(model, tokens(2))
