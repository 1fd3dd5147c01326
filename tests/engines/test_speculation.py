"""Speculation changes no token, and drafts are the MTP layer's: the target accepts as many as the reference's."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat_core.drafting import gate as drafting
from longcat_core.weights import names
from longcat_core.weights.plan import Target
from tests.cases import CASES, Case, drafting_tensors, write_checkpoint
from tests.harness import ENGINE, engine
from tests.speculation import CASE, MOST_DRAFTS, NEW_TOKENS, prompts_of, reference_of, steps_of, the_gate, truth

DRAFTS = (1, MOST_DRAFTS)
broken = import_module(f"tests.{ENGINE}.broken")


@pytest.fixture
def directory(drafting_checkpoint_of: Callable[[Case], Path]) -> Path:
    return drafting_checkpoint_of(CASE)


def assert_drafts_are_the_references(served: engine.Engine, draft_tokens: int, case: Case = CASE) -> None:
    """Tokens, and accepted drafts verification by verification."""
    prompts = prompts_of(case)
    for prompt, ours in zip(prompts, served.speculated(prompts, NEW_TOKENS), strict=True):
        wanted = truth(case, prompt, NEW_TOKENS, draft_tokens)
        assert ours.tokens == wanted.tokens, f"{len(prompt)=}, {draft_tokens=}"
        assert ours.accepted == wanted.accepted, f"accepted drafts, {len(prompt)=}, {draft_tokens=}"


def assert_tokens(served: engine.Engine) -> None:
    prompts = prompts_of(CASE)
    wanted = [truth(CASE, prompt, NEW_TOKENS, 1).tokens for prompt in prompts]
    assert served.greedy(prompts, NEW_TOKENS) == wanted


@pytest.mark.parametrize(("name", "draft_tokens"), [("default", 1), *((name, MOST_DRAFTS) for name in CASES)])
def test_tokens_and_accepted_drafts_are_the_references(
    name: str, draft_tokens: int, drafting_checkpoint_of: Callable[[Case], Path]
) -> None:
    with engine.serving(drafting_checkpoint_of(CASES[name]), draft_tokens=draft_tokens) as served:
        assert_drafts_are_the_references(served, draft_tokens, CASES[name])


def test_the_drafts_of_these_tests_are_accepted_30_to_95_percent_of_the_time() -> None:
    taken = [truth(CASE, prompt, NEW_TOKENS, 1).accepted for prompt in prompts_of(CASE)]
    share = sum(map(sum, taken)) / sum(map(len, taken))
    assert 0.3 < share < 0.95


@pytest.mark.parametrize("draft_tokens", DRAFTS)
def test_speculation_with_prompts_in_chunks_of_16_tokens(draft_tokens: int, directory: Path) -> None:
    with engine.serving(directory, draft_tokens=draft_tokens, chunk=16, prefix_caching=False) as served:
        assert_drafts_are_the_references(served, draft_tokens)


@pytest.mark.parametrize("draft_tokens", DRAFTS)
def test_speculation_with_prefix_hits(draft_tokens: int, directory: Path) -> None:
    """What is found in the cache is the MTP layer's as well."""
    with engine.serving(directory, draft_tokens=draft_tokens, block_size=8 if ENGINE == "vllm" else None) as served:
        assert_drafts_are_the_references(served, draft_tokens)
        before = served.cached_tokens
        assert_drafts_are_the_references(served, draft_tokens)
        assert served.cached_tokens - before >= 64


def test_speculation_one_request_at_a_time(directory: Path) -> None:
    with engine.serving(directory, draft_tokens=MOST_DRAFTS, max_running=1) as served:
        assert_drafts_are_the_references(served, MOST_DRAFTS)


def test_speculation_under_preemption(directory: Path) -> None:
    """A request that comes back is a prompt again, so only its tokens are the same."""
    with engine.serving(
        directory, draft_tokens=MOST_DRAFTS, cache_tokens=144, block_size=8 if ENGINE == "vllm" else None
    ) as served:
        assert_tokens(served)
        assert served.preemptions > 0


def test_speculation_on_two_ranks(directory: Path) -> None:
    with engine.serving(directory, draft_tokens=MOST_DRAFTS, tensor_parallel=2) as served:
        assert_drafts_are_the_references(served, MOST_DRAFTS)


def mtp_scales_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    folded = Target.folded

    def unfolded(target: Target, tensor: Tensor) -> Tensor:
        return tensor if target.parameter.startswith("model.layers.0.self_attn.kv") else folded(target, tensor)

    monkeypatch.setattr(Target, "folded", unfolded)


@pytest.mark.parametrize("break_it", [*broken.DRAFTS, mtp_scales_left_out], ids=lambda break_it: break_it.__name__)
def test_the_drafts_are_others_when_the_mtp_layer_is_broken(
    break_it: Callable[[pytest.MonkeyPatch], None], directory: Path
) -> None:
    with engine.serving(directory, draft_tokens=2, broken=break_it) as served:
        with pytest.raises(AssertionError, match="accepted drafts"):
            assert_drafts_are_the_references(served, 2)
        assert_tokens(served)


def assert_drafts_pass_the_gate(served: engine.Engine, draft_tokens: int, case: Case = CASE) -> None:
    prompts = prompts_of(case)
    for prompt, ours in zip(prompts, served.speculated(prompts, NEW_TOKENS), strict=True):
        wanted = truth(case, prompt, NEW_TOKENS, draft_tokens, the_gate(case))
        assert ours.tokens == wanted.tokens, f"{len(prompt)=}, {draft_tokens=}"
        assert ours.accepted == wanted.accepted, f"accepted drafts, {len(prompt)=}, {draft_tokens=}"


@pytest.mark.parametrize("name", CASES)
def test_with_a_gate_the_drafts_that_pass_it_are_verified_for_every_model(
    name: str, gated_checkpoint_of: Callable[[Case], Path]
) -> None:
    case = CASES[name]
    with engine.serving(gated_checkpoint_of(case), draft_tokens=MOST_DRAFTS, **engine.GATED) as served:
        assert_drafts_pass_the_gate(served, MOST_DRAFTS, case)


def test_with_a_gate_a_single_draft_that_passes_it_is_verified(gated: Path) -> None:
    with engine.serving(gated, draft_tokens=1, **engine.GATED) as served:
        assert_drafts_pass_the_gate(served, 1)


HOW = {"chunks": {"chunk": 16}, "alone": {"max_running": 1}, "two ranks": {"tensor_parallel": 2}}


@pytest.mark.parametrize("how", HOW)
def test_the_gate_judges_alike_however_requests_are_scheduled(how: str, gated: Path) -> None:
    with engine.serving(gated, draft_tokens=MOST_DRAFTS, **HOW[how], **engine.GATED) as served:
        assert_drafts_pass_the_gate(served, MOST_DRAFTS)
        assert_drafts_pass_the_gate(served, MOST_DRAFTS)  # from the prefix cache


@pytest.mark.parametrize("has_gate", [False, True], ids=["no gate", "gate"])
def test_speculation_with_experts_on_two_ranks(has_gate: bool, gated: Path) -> None:
    asked = engine.GATED if has_gate else {}
    with engine.serving(gated, draft_tokens=3, tensor_parallel=2, expert_parallel=True, **asked) as served:
        (assert_drafts_pass_the_gate if has_gate else assert_drafts_are_the_references)(served, 3)


def test_the_gate_under_preemption(gated: Path) -> None:
    small = {"cache_tokens": 144, "block_size": 8 if ENGINE == "vllm" else None}
    with engine.serving(gated, draft_tokens=MOST_DRAFTS, **small, **engine.GATED) as served:
        assert_tokens(served)
        assert served.preemptions > 0


@pytest.mark.parametrize("name", CASES)
def test_the_gate_of_these_tests_prunes_a_part_of_the_drafts(name: str) -> None:
    case = CASES[name]
    for draft_tokens in DRAFTS:
        taken = [steps_of(case, prompt, NEW_TOKENS, draft_tokens, the_gate(case)) for prompt in prompts_of(case)]
        steps = [step for each in taken for step in each]
        assert 0.1 < sum(step.verified for step in steps) / (draft_tokens * len(steps)) < 0.9


def test_a_gate_of_another_model_is_refused(gated: Path, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "other", CASE.config, drafting_tensors(CASE.config, seed=7))
    drafting.save(the_gate(), directory, drafting.fingerprint(gated, CASE.config))
    with pytest.raises(Exception, match="belongs to another model"):
        engine.configure(directory, **engine.speculation(1), **engine.GATED)
    assert engine.configure(directory, **engine.speculation(1)) == CASE.config, "it is read on request only"


def test_a_gate_that_is_not_there_or_has_no_drafts_is_refused(directory: Path, gated: Path) -> None:
    with pytest.raises(Exception, match="has no draft gate; train one with `longcat train-gate`"):
        engine.configure(directory, **engine.speculation(1), **engine.GATED)
    with pytest.raises(Exception, match="there are no drafts of the MTP layer"):
        engine.configure(gated, **engine.GATED)


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {other: tensor for other, tensor in tensors.items() if not other.startswith(name)}


def test_speculation_without_an_mtp_layer_is_refused_before_anything_starts(tmp_path: Path) -> None:
    tensors = without(drafting_tensors(CASE.config), names.MTP_PREFIX)
    directory = write_checkpoint(tmp_path, CASE.config, tensors)
    assert engine.configure(directory) == CASE.config
    with pytest.raises(Exception, match=r"has no MTP layer .*serve it without speculation"):
        engine.configure(directory, **engine.speculation(1))


def test_mtp_tensors_that_are_missing_or_misshapen_are_named(tmp_path: Path) -> None:
    layer = f"{names.MTP_PREFIX}layers.0"
    tensors = without(drafting_tensors(CASE.config), f"{layer}.hnorm")
    tensors[f"{layer}.eh_proj.weight"] = tensors[f"{layer}.eh_proj.weight"][:, 1:]
    directory = write_checkpoint(tmp_path, CASE.config, tensors)
    with pytest.raises(Exception, match=rf"misshapen: {layer}.eh_proj.weight(.|\n)*missing: {layer}.hnorm.m.weight"):
        engine.configure(directory, **engine.speculation(1))


SAMPLES = 1500
TEMPERATURE = 0.8


@torch.no_grad()
@pytest.mark.parametrize("has_gate", [False, True], ids=["no gate", "gate"])
def test_sampled_tokens_have_the_targets_distribution(has_gate: bool, gated: Path) -> None:
    """The first token comes from the prompt, the second out of the verification of a draft."""
    prompt = prompts_of(CASE)[2]
    with engine.serving(gated, draft_tokens=3, **(engine.GATED if has_gate else {})) as served:
        drawn = torch.tensor(served.sampled(prompt, 2, [TEMPERATURE] * SAMPLES))
    model = reference_of(CASE)

    def probabilities(prompts: Tensor) -> Tensor:
        return (model(prompts)[0][:, -1] / TEMPERATURE).softmax(dim=-1)

    first = probabilities(torch.tensor([prompt]))[0]
    likely = torch.nonzero(first > 1e-5).squeeze(1)
    second = first[likely] @ probabilities(
        torch.cat([torch.tensor([prompt]).expand(len(likely), -1), likely[:, None]], 1)
    )
    assert_drawn_from(first, drawn[:, 0])
    assert_drawn_from(second, drawn[:, 1])
    assert (second - first).abs().sum() > 0.5, "the two are different distributions"


@pytest.mark.parametrize("has_gate", [False, True], ids=["no gate", "gate"])
def test_requests_that_sample_leave_those_beside_them_greedy(has_gate: bool, gated: Path) -> None:
    prompt = prompts_of(CASE)[2]
    wanted = truth(CASE, prompt, NEW_TOKENS, 3).tokens
    with engine.serving(gated, draft_tokens=3, **(engine.GATED if has_gate else {})) as served:
        greedy, hot, again = served.sampled(prompt, NEW_TOKENS, [0, 2.0, 0])
    assert greedy == again == wanted
    assert hot != wanted


def assert_drawn_from(probabilities: Tensor, drawn: Tensor) -> None:
    """Pearson's chi-squared test at 1e-4, over the tokens that are expected five times and all others as one."""
    expected = probabilities * len(drawn)
    often = expected >= 5
    observed = torch.bincount(drawn, minlength=len(probabilities)).float()
    expected = torch.cat((expected[often], expected[~often].sum()[None]))
    observed = torch.cat((observed[often], observed[~often].sum()[None]))
    statistic = ((observed - expected).square() / expected).sum()
    freedom = len(expected) - 1
    assert freedom > 3, "too few outcomes to tell"
    assert torch.special.gammaincc(torch.tensor(freedom / 2), statistic / 2) > 1e-4
