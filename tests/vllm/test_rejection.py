"""vLLM's verification of drafts on a CPU, whose kernels are other code than on a GPU, against the formula in torch."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longcat_core.plugin.hooks import Around, Wrapper, guarded
from longcat_vllm.devices.cpu import patches
from longcat_vllm.hooks import HOOKS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM takes the kernels of the GPU")
VOCABULARY = 11
DRAFTS = [3, 0, 2, 1]
"""Of each request of the batch."""
ENDS = torch.tensor(DRAFTS, dtype=torch.int32).cumsum(0, dtype=torch.int32)
GREEDY = torch.tensor([0.0, 0.7, 1.0, 0.0])
"""Temperatures: every first and last request is greedy."""


@pytest.fixture(autouse=True, scope="module")
def kernels_of_the_cpu() -> None:
    from vllm.platforms import current_platform

    current_platform.register_triton_kernel_overrides()


def verified(drafts: Tensor, target: Tensor, bonus: Tensor, recovered: Tensor, uniform: Tensor) -> list[list[int]]:
    """Tokens of each request (arXiv 2211.17192, with a draft model that is certain), -1 behind the last."""
    answers, start = [], 0
    for request, end in enumerate(ENDS.tolist()):
        answer = []
        for token in range(start, end):
            if GREEDY[request] == 0:
                answer.append(int(target[token].argmax()))
                accepted = answer[-1] == drafts[token]
            else:
                accepted = bool(target[token, drafts[token]] >= uniform[token])
                answer.append(int(drafts[token] if accepted else recovered[token]))
            if not accepted:
                break
        else:
            answer.append(int(bonus[request]))
        answers.append(answer + [-1] * (max(DRAFTS) + 1 - len(answer)))
        start = end
    return answers


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("seed", range(20))
def test_drafts_are_verified_as_the_formula_says(
    seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.sample import rejection_sampler

    torch.manual_seed(seed)
    logits = 2 * torch.randn(sum(DRAFTS), VOCABULARY)
    likely = torch.rand(len(logits)) < 0.6
    drafts = torch.where(likely, logits.argmax(-1), torch.randint(VOCABULARY, (len(logits),))).to(dtype)
    bonus = torch.randint(VOCABULARY, (len(DRAFTS), 1), dtype=dtype)
    taken: dict[str, Tensor] = {}

    def noted(name: str) -> None:
        original = getattr(rejection_sampler, name)

        def call(*args: Any) -> Tensor:
            taken[name] = original(*args)
            return taken[name]

        monkeypatch.setattr(rejection_sampler, name, call)

    noted("sample_recovered_tokens")
    noted("generate_uniform_probs")
    metadata = SimpleNamespace(all_greedy=False, all_random=False, temperature=GREEDY, generators={})
    ours = rejection_sampler.rejection_sample(drafts, DRAFTS, max(DRAFTS), ENDS, None, logits, bonus, metadata)
    recovered, uniform = taken["sample_recovered_tokens"], taken["generate_uniform_probs"]
    assert ours.tolist() == verified(drafts, logits.softmax(-1), bonus[:, 0], recovered, uniform)
    assert ((recovered >= 0) & (recovered < VOCABULARY) & (recovered != drafts)).all()


def test_a_rejected_draft_is_replaced_by_the_rest_of_the_distribution() -> None:
    from vllm.v1.sample.rejection_sampler import sample_recovered_tokens

    torch.manual_seed(0)
    count, probabilities = 20_000, torch.tensor([0.5, 0.3, 0.15, 0.05])
    drafts, ends = torch.zeros(count, dtype=torch.int32), torch.arange(1, count + 1, dtype=torch.int32)
    target, metadata = probabilities.expand(count, -1).contiguous(), SimpleNamespace(generators={})
    drawn = sample_recovered_tokens(1, [1] * count, ends, drafts, None, target, metadata, torch.device("cpu"))
    shares = drawn.bincount(minlength=4) / count
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.6, 0.3, 0.1]), atol=0.02, rtol=0)


def around(name: str) -> Around:
    """What the hook of this name puts around vLLM's function."""
    (hook,) = (hook for hook in HOOKS if isinstance(hook, Wrapper) and hook.name == name)
    return guarded(hook.name, hook.around, hook.concerns)


@pytest.mark.parametrize("architecture", ["LongcatFlashForCausalLM", "LlamaForCausalLM"])
@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("sampling parameters of drafts", "expand_on_a_cpu"),
        ("constraints of no drafts", "constrain_drafts_there_are"),
    ],
)
def test_what_gets_tensors_alone_is_ours_under_a_longcats_runner_alone(
    name: str, ours: str, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model in the same process has vLLM's own."""
    monkeypatch.setattr(patches, ours, lambda *_: "ours")
    model = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))
    runner = SimpleNamespace(model_config=model, input_batch=SimpleNamespace(generators={}))

    def sample(*_: Any) -> Any:
        return around(name)(lambda *_: "vLLM's", GREEDY, ENDS)

    is_longcat = architecture.startswith("Longcat")
    assert around("generators of discarded chunks")(sample, runner) == ("ours" if is_longcat else "vLLM's")
    assert sample() == "vLLM's"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_sampling_parameters_are_repeated_for_each_draft(dtype: torch.dtype) -> None:
    def never(*_: Any) -> Tensor:
        raise AssertionError("vLLM's kernel loses them")

    values = torch.tensor([3, 0, 7, 1], dtype=dtype)
    for replaced in (0, 1):
        wanted = [int(value) or replaced for value, count in zip(values, DRAFTS, strict=True) for _ in range(count)]
        expanded = patches.expand_on_a_cpu(never, values, ENDS, sum(DRAFTS), 0, replaced)
        assert expanded.dtype is dtype
        assert expanded.tolist() == wanted
