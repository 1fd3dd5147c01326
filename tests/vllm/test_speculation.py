"""What speculation needs of vLLM beside what `tests/engines/test_speculation.py` asks of both engines."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longcat_vllm.devices.cpu import patches
from tests.cases import CASES, Case, drafting_tensors, write_checkpoint
from tests.engines.test_speculation import assert_drafts_are_the_references, assert_drafts_pass_the_gate
from tests.plugin import python
from tests.speculation import CASE, NEW_TOKENS, prompts_of, steps_of, truth
from tests.vllm.engine import GATED, configure, serving, speculation, speculation_metrics


@pytest.fixture
def directory(drafting_checkpoint_of: Callable[[Case], Path]) -> Path:
    return drafting_checkpoint_of(CASE)


def test_the_targets_configuration_is_the_same_with_a_drafter(directory: Path) -> None:
    """vLLM's own drafter sets the target's n_routed_experts to None."""
    with serving(directory) as plain:
        without = plain.llm.llm_engine.vllm_config.model_config.hf_config.to_dict()
    with serving(directory, draft_tokens=1) as drafting:
        config = drafting.llm.llm_engine.vllm_config
        assert config.model_config.hf_config.to_dict() == without
        assert config.speculative_config.draft_model_config.hf_config is not config.model_config.hf_config


def test_torch_compile_with_drafts(directory: Path) -> None:
    with serving(directory, draft_tokens=3, enforce_eager=False) as served:
        assert_drafts_are_the_references(served, 3)


def test_an_embedding_equal_to_the_targets_is_shared(tmp_path: Path) -> None:
    tensors = drafting_tensors(CASE.config)
    tensors["model.mtp.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    with serving(write_checkpoint(tmp_path, CASE.config, tensors), draft_tokens=1) as served:
        runner = served.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        assert runner.drafter.model.model.embed_tokens is runner.model.model.embed_tokens


def test_metrics_without_a_gate_count_every_draft(directory: Path) -> None:
    """With one they are looked at over HTTP, in tests/engines/test_speculation_server.py."""
    steps = [step for prompt in prompts_of(CASE) for step in steps_of(CASE, prompt, NEW_TOKENS, draft_tokens=3)]
    with serving(directory, draft_tokens=3) as served:
        served.speculated(prompts_of(CASE), NEW_TOKENS)
        counted = {metric.name: getattr(metric, "value", None) for metric in served.llm.get_metrics()}
    wanted = {name.removesuffix("_total"): count for name, count in speculation_metrics(steps).items()}
    assert {name: counted[name] for name in wanted} == wanted


def test_a_seed_draws_the_same_tokens_when_its_prompt_comes_in_chunks(checkpoint_of: Callable[[Case], Path]) -> None:
    """vLLM's runner cannot take a draw back on a CPU; if its engine does not end, see `patches`."""
    prompt = CASES["default"].prompts(1, 40)[0]
    drawn = []
    for chunk in (16, None):
        with serving(checkpoint_of(CASES["default"]), chunk=chunk, prefix_caching=False) as served:
            drawn.append(served.sampled(prompt, 8, [0.8] * 4))
    assert drawn[0] == drawn[1]


def as_the_original(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


def test_vllm_still_ends_over_a_seed_whose_prompt_comes_in_chunks(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, the hook 'generators of discarded chunks' may have become unnecessary."""
    monkeypatch.setattr(patches, "sample_without_discarded_requests", as_the_original)
    with (
        serving(directory, chunk=16, prefix_caching=False) as served,
        pytest.raises(RuntimeError, match="does not use offset"),
    ):
        served.sampled(CASE.prompts(1, 40)[0], 2, [0.8])


def test_vllm_still_loses_the_temperatures_of_drafts() -> None:
    """If this fails, the hook 'sampling parameters of drafts' may have become unnecessary."""
    from vllm.utils.cpu_triton_utils import _expand_kernel_impl

    values, ends = torch.tensor([0.5, 0.0, 2.0]), torch.tensor([2, 2, 3])
    expanded = torch.full((3,), -1.0)
    _expand_kernel_impl(expanded, values, ends, 0, 1)
    assert expanded.tolist() == [-1.0, -1.0, -1.0]
    assert patches.expand_on_a_cpu(_expand_kernel_impl, values, ends, 3, 0, 1).tolist() == [0.5, 0.5, 2.0]


def test_vllm_still_cannot_constrain_no_drafts_to_top_k() -> None:
    """If this fails, the hook 'constraints of no drafts' may have become unnecessary."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    def constrain(logits: torch.Tensor) -> torch.Tensor:
        return apply_top_k_top_p(logits, torch.tensor([2] * len(logits), dtype=torch.int32), None)

    nothing, row = torch.empty(0, 4), torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    with pytest.raises(RuntimeError, match="Expected reduction dim"):
        constrain(nothing)
    assert patches.constrain_drafts_there_are(constrain, nothing) is nothing
    assert patches.constrain_drafts_there_are(constrain, row).isfinite().tolist() == [[False, True, True, False]]


def test_a_request_with_top_k_alone_is_answered_beside_others(directory: Path) -> None:
    """Also as the first of all, whose step has no drafts; without one draft of a greedy request being another."""
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": prompts_of(CASE)[2]}
    alike = {"max_tokens": NEW_TOKENS, "ignore_eos": True, "detokenize": False, "seed": 0}
    sampled = [
        SamplingParams(top_k=2, **alike),
        SamplingParams(top_k=1, **alike),
        SamplingParams(temperature=0, **alike),
    ]
    with serving(directory, draft_tokens=3) as served:
        (first,) = served.llm.generate([prompt], sampled[:1], use_tqdm=False)
        together = served.llm.generate([prompt] * 3, sampled, use_tqdm=False)
    answers = [list(each.outputs[0].token_ids) for each in (first, *together)]
    assert [len(answer) for answer in answers] == [NEW_TOKENS] * 4
    assert answers[2] == answers[3] == truth(CASE, prompts_of(CASE)[2], NEW_TOKENS, 3).tokens


def test_n_gram_drafts_change_no_token(directory: Path) -> None:
    """The method that needs no weights, and that stock vLLM offers on a CPU.

    In a process of its own: numba, which it imports, keeps vLLM from starting another engine in the same process.
    """
    prompts = prompts_of(CASE)
    script = f"""
if __name__ == "__main__":
    import json
    from vllm import LLM, SamplingParams
    n_grams = {{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}}
    llm = LLM({str(directory)!r}, dtype="float32", enforce_eager=True, max_model_len=256, skip_tokenizer_init=True,
              kv_cache_memory_bytes=1 << 25, disable_log_stats=False, speculative_config=n_grams)
    sampling = SamplingParams(temperature=0, max_tokens={NEW_TOKENS}, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{{"prompt_token_ids": prompt}} for prompt in {prompts}], sampling, use_tqdm=False)
    counted = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:spec_decode_num_accepted_tokens"]
    print(json.dumps([sum(counted), [list(output.outputs[0].token_ids) for output in outputs]]))
"""
    in_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    accepted, tokens = json.loads(python(script, **in_process))
    assert tokens == [truth(CASE, prompt, NEW_TOKENS, 1).tokens for prompt in prompts]
    assert accepted > 0


def test_vllm_still_drafts_from_another_token_after_a_chunk(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, `patches.keep_scheduling_settings` may leave padded batches on."""
    monkeypatch.setattr(patches, "mtp_speculation", lambda config: None)
    with (
        serving(directory, draft_tokens=2, chunk=16, prefix_caching=False) as served,
        pytest.raises(AssertionError, match="accepted drafts"),
    ):
        assert_drafts_are_the_references(served, 2)


def test_vllm_still_has_no_place_for_a_gate(gated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the hook 'draft gate' may have become unnecessary."""
    monkeypatch.setattr("longcat_vllm.speculation.propose_what_passes", as_the_original)
    monkeypatch.setattr("longcat_vllm.speculation.GatedDrafts.observe", lambda self, logits: None)
    with (
        serving(gated, draft_tokens=3, **GATED) as served,
        pytest.raises(AssertionError, match="accepted drafts"),
    ):
        assert_drafts_pass_the_gate(served, 3)


def test_a_gate_with_something_in_its_way_is_refused(gated: Path) -> None:
    stock = "vllm.v1.core.sched.scheduler.Scheduler"
    with pytest.raises(ValueError, match=f"scheduler_cls is {stock!r}, wanted none; leave it out; or leave the draft"):
        configure(gated, **speculation(3), **GATED, scheduler_cls=stock)
    configure(gated, **speculation(3), scheduler_cls=stock)


def test_a_gate_that_is_not_asked_for_changes_nothing(gated: Path) -> None:
    with serving(gated, draft_tokens=3) as served:
        assert served.llm.llm_engine.vllm_config.scheduler_config.scheduler_cls is None
        assert_drafts_are_the_references(served, 3)


@pytest.mark.parametrize("given", [{"draft_gate": "yes"}, {"gate": True}, True])
def test_what_is_no_option_of_ours_is_named(given: object, gated: Path) -> None:
    with pytest.raises(ValueError, match=r"longcat.*, wanted (true or false|longcat.draft_gate)|gate: wanted longcat."):
        configure(gated, additional_config={"longcat": given})


def test_vllm_still_makes_one_tensor_of_lengths_and_of_their_bound(
    drafting_checkpoint_of: Callable[[Case], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, the hook 'lengths of drafts' may have become unnecessary."""
    monkeypatch.setattr(patches, "prepare_with_lengths_of_its_own", as_the_original)
    case = CASES["latent_512_rope_64"]  # of which a draft changes for it
    with (
        serving(drafting_checkpoint_of(case), draft_tokens=3) as served,
        pytest.raises(AssertionError, match="accepted drafts"),
    ):
        assert_drafts_are_the_references(served, 3, case)


@pytest.mark.parametrize("draft_tokens", [1, 4])
def test_answers_with_drafts_reach_the_end_of_the_context(draft_tokens: int, directory: Path) -> None:
    prompt = prompts_of(CASE)[2]
    new_tokens = 96 - len(prompt)
    with serving(directory, draft_tokens=draft_tokens, max_model_len=96) as served:
        (ours,) = served.greedy([prompt], new_tokens)
    assert ours == truth(CASE, prompt, new_tokens, 1).tokens


def test_another_longcats_drafter_stays_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash-Lite's, which has the same architecture."""
    from vllm.model_executor.models import longcat_flash_mtp

    from longcat_vllm.mtp import LongcatFlashMTP

    monkeypatch.setattr(longcat_flash_mtp, "LongCatFlashMTP", lambda **given: given)
    other = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(architectures=["LongcatFlashNgramForCausalLM"]))
    )
    assert LongcatFlashMTP(vllm_config=other, prefix="draft") == {"vllm_config": other, "prefix": "draft"}


def test_another_longcats_drafter_stays_vllms_where_a_hook_has_failed() -> None:
    failed = (
        "from longcat_vllm.engine import VLLM\n"
        "VLLM.failures['checkpoint check'] = 'KeyError'\n"
        "import longcat_vllm.mtp\n"
        "print('imported')"
    )
    assert python(failed) == "imported"
