"""What speculation needs of SGLang beside what `tests/engines/test_speculation.py` asks of both engines."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sglang.srt.runtime_context import get_context
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from torch import Tensor

from longcat_core.drafting.gate import draft_chains, walk
from longcat_core.reference import LongcatForCausalLM
from longcat_core.weights import checkpoint
from longcat_sglang import deployment, engine
from longcat_sglang.model import LongcatCausalLM
from longcat_sglang.mtp import LongcatFlashMTP
from tests.cases import Case, drafting_tensors
from tests.engines.test_speculation import (
    assert_drafts_are_the_references,
    assert_drafts_pass_the_gate,
    assert_tokens,
)
from tests.plugin import save_llama
from tests.sglang.engine import GATED, Engine, configure, serving, settled, speculation
from tests.speculation import CASE, NEW_TOKENS, prompts_of, reference_of, steps_of, the_gate, truth


@pytest.fixture
def directory(drafting_checkpoint_of: Callable[[Case], Path]) -> Path:
    return drafting_checkpoint_of(CASE)


def chain(settings: dict[str, Any]) -> tuple[int, int, int]:
    names = ("speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens")
    steps, branches, nodes = (settings[name] for name in names)
    return steps, branches, nodes


@pytest.mark.parametrize("algorithm", ["NEXTN", "EAGLE", "nextn"])
def test_the_flag_alone_makes_a_chain_of_three_drafts(algorithm: str, directory: Path) -> None:
    assert chain(settled(directory, speculative_algorithm=algorithm)) == (3, 1, 4)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_number_of_steps_makes_a_chain_of_so_many_drafts(steps: int, directory: Path) -> None:
    settings = settled(directory, speculative_algorithm="NEXTN", speculative_num_steps=steps)
    assert chain(settings) == (steps, 1, steps + 1)


def test_what_sglang_changes_beside_is_known(directory: Path) -> None:
    plain, drafting = settled(directory, random_seed=0), settled(directory, random_seed=0, **speculation(2))
    changed = {name: drafting[name] for name in plain if plain[name] != drafting[name]}
    assert {name: value for name, value in changed.items() if not name.startswith("speculative_")} == {
        "max_running_requests": 48,
        "disable_overlap_schedule": True,
    }


def test_the_models_own_directory_may_be_named_as_the_drafters(directory: Path) -> None:
    with serving(directory, draft_tokens=2, speculative_draft_model_path=str(directory)) as served:
        assert_drafts_are_the_references(served, 2)


@pytest.mark.parametrize(
    "option",
    [
        {"enable_mixed_chunk": True, "chunk": 16},
        {"speculative_adaptive": True},
        {"speculative_use_rejection_sampling": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_option_of_sglangs_changes_no_token(option: dict[str, Any], directory: Path) -> None:
    with serving(directory, draft_tokens=3, **option) as served:
        assert_tokens(served)


def compare_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the engine fail where building the drafter changes the target's configuration."""
    from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

    def checked(self: EagleDraftWorker, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any) -> None:
        config = target_worker.model_config.hf_config
        before = copy.deepcopy(vars(config))
        build(self, server_args, gpu_id, nccl_port, target_worker)
        assert vars(config) == before
        drafter = self.draft_runner.model_config.hf_config
        assert drafter is not config
        assert drafter.longcat == config.longcat
        assert drafter.num_hidden_layers == 1 != config.num_hidden_layers

    build = EagleDraftWorker.__init__
    monkeypatch.setattr(EagleDraftWorker, "__init__", checked)


def test_the_targets_configuration_is_the_same_with_a_drafter(directory: Path) -> None:
    with serving(directory, draft_tokens=1, broken=compare_configurations) as served:
        assert_drafts_are_the_references(served, 1)


def test_an_update_of_the_weights_is_in_the_next_drafts(directory: Path) -> None:
    tensors, prompt, draft_tokens = drafting_tensors(CASE.config, seed=1), prompts_of(CASE)[2], 2
    model = LongcatForCausalLM(CASE.config)
    model.load_published(tensors)
    continuation = model.generate(prompt, NEW_TOKENS + draft_tokens)
    chains = draft_chains(model, prompt, continuation, draft_tokens)
    steps = [step for step in walk(chains.accepted, draft_tokens) if step.position + 1 < NEW_TOKENS]
    with serving(directory, draft_tokens=draft_tokens, prefix_caching=False) as served:
        assert_drafts_are_the_references(served, draft_tokens)
        served.update(tensors)
        (ours,) = served.speculated([prompt], NEW_TOKENS)
    assert ours.tokens == continuation[:NEW_TOKENS] != truth(CASE, prompt, NEW_TOKENS, draft_tokens).tokens
    assert ours.accepted == [min(step.accepted, NEW_TOKENS - 2 - step.position) for step in steps]


@pytest.fixture(scope="module")
def sampling(drafting_checkpoint_of: Callable[[Case], Path]) -> Iterator[Engine]:
    with serving(drafting_checkpoint_of(CASE), draft_tokens=3, enable_custom_logit_processor=True) as served:
        yield served


def answers(served: Engine, *requests: dict[str, Any], **options: Any) -> list[list[int]]:
    """Of one prompt, in one batch, with these parameters."""
    parameters = [{"max_new_tokens": NEW_TOKENS, "ignore_eos": True, **request} for request in requests]
    prompts = [prompts_of(CASE)[2]] * len(requests)
    outputs = served.sglang.generate(input_ids=prompts, sampling_params=parameters, **options)
    return [output["output_ids"] for output in outputs]


@pytest.mark.parametrize("filtered", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=lambda f: next(iter(f)))
def test_sampling_out_of_the_best_token_alone_is_greedy(filtered: dict[str, float], sampling: Engine) -> None:
    (tokens,) = answers(sampling, {"temperature": 5.0, **filtered})
    assert tokens == truth(CASE, prompts_of(CASE)[2], NEW_TOKENS, 3).tokens


def test_a_biased_token_is_sampled_in_every_place(sampling: Engine) -> None:
    (tokens,) = answers(sampling, {"temperature": 1.0, "logit_bias": {"7": 100.0}})
    assert tokens == [7] * NEW_TOKENS


PENALTIES = [
    {"temperature": 0.0, "frequency_penalty": 1.5},
    {"temperature": 0.0, "presence_penalty": 1.7, "frequency_penalty": -0.2},
    {"temperature": 0.0, "repetition_penalty": 1.5},
]


@torch.no_grad()
def penalised(frequency_penalty: float = 0, presence_penalty: float = 0, repetition_penalty: float = 1) -> list[int]:
    """The reference's greedy answer, with penalties as SGLang defines them: of the tokens that were generated."""
    model, prompt, answer = reference_of(CASE), prompts_of(CASE)[2], []
    for _ in range(NEW_TOKENS):
        logits = model(torch.tensor([prompt + answer]))[0][0, -1]
        counts = torch.bincount(torch.tensor(answer, dtype=torch.int64), minlength=len(logits))
        logits = logits - frequency_penalty * counts - presence_penalty * (counts > 0)
        scaled = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
        answer.append(int(torch.where(counts > 0, scaled, logits).argmax()))
    return answer


def assert_penalties_are_exact(served: Engine) -> None:
    wanted = [penalised(**{name: value for name, value in each.items() if name != "temperature"}) for each in PENALTIES]
    plain = truth(CASE, prompts_of(CASE)[2], NEW_TOKENS, 3).tokens
    assert plain not in wanted, "the penalties must have something to do"
    assert answers(served, *PENALTIES, {"temperature": 0.0}) == [*wanted, plain]


def test_penalties_are_exact_with_drafts(sampling: Engine) -> None:
    assert_penalties_are_exact(sampling)


class OnlyToken7(CustomLogitProcessor):
    def __call__(self, logits: Tensor, custom_param_list: list[dict[str, Any]]) -> Tensor:
        logits[:, :7] = logits[:, 8:] = -torch.inf
        return logits


def test_a_custom_logit_processor_has_its_say_with_drafts(sampling: Engine) -> None:
    requests = {"temperature": 0.0}, {"temperature": 0.0}
    ours, plain = answers(sampling, *requests, custom_logit_processor=[OnlyToken7().to_str(), None])
    assert ours == [7] * NEW_TOKENS
    assert plain == truth(CASE, prompts_of(CASE)[2], NEW_TOKENS, 3).tokens


def test_two_ranks_sample_the_same_tokens(directory: Path) -> None:
    """Ranks that parted would wait for each other in vain, or attend to different contexts."""
    with serving(directory, draft_tokens=3, tensor_parallel=2) as served:
        hot = answers(served, *[{"temperature": 5.0}] * 8)
        assert len({tuple(tokens) for tokens in hot}) == 8
        assert_tokens(served)


# -- what the patches are for is still so ------------------------------------------------------------


def test_sglangs_mtp_layer_still_takes_the_targets_latent() -> None:
    """If this fails, SGLang's own drafter may have become right: see `mtp.LongcatMTPLayer`."""
    from sglang.srt.models.longcat_flash_nextn import LongcatFlashDenseDecoderLayer

    assert "qkv_latent_func" not in inspect.getsource(LongcatFlashDenseDecoderLayer)


def test_sglang_still_drafts_with_backends_of_its_own_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the row "draft attention" may have become unnecessary."""
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    known: dict[str, Any] = {}
    factory = object.__new__(DraftBackendFactory)
    factory.draft_model_runner = SimpleNamespace(model_config=SimpleNamespace(hf_config=None))
    factory.speculative_num_steps, factory.qsa_profile = 2, None
    monkeypatch.setattr("sglang.srt.speculative.draft_utils._assert_draft_needs_no_conv_sidecar", lambda runner: None)
    monkeypatch.setattr(factory, "_create_backend", lambda name, backends, *rest, **named: known.update(backends))
    factory.create_decode_backend()
    assert known
    assert engine.CPU_ATTENTION not in known


def test_sglang_still_verifies_greedily_on_a_cpu() -> None:
    """If this fails, the row "sampled verification" may have become unnecessary."""
    from sglang.srt.speculative.eagle_utils import _verify_uses_greedy

    how = {"is_all_greedy": False, "is_cpu": True, "is_hip": False, "is_xpu": False, "use_rejection_sampling": False}
    assert _verify_uses_greedy(**how)


def test_sglang_still_compiles_the_choice_of_drafts() -> None:
    """If this fails, `patches.select_drafts_without_a_compiler` may have become unnecessary, or does nothing."""
    from sglang.srt.speculative.spec_utils import _select_top_k_tokens_later

    assert callable(_select_top_k_tokens_later._torchdynamo_orig_callable)


def test_sglang_still_cannot_take_a_number_of_steps_alone(tmp_path: Path) -> None:
    """If this fails, `deployment.settle` need not choose a chain where there is only a number of steps."""
    with pytest.raises(TypeError, match="'>' not supported"):
        configure(save_llama(tmp_path), speculative_algorithm="EAGLE", speculative_num_steps=2)


@pytest.mark.parametrize(("steps", "branches", "nodes"), [(9, 1, 10), (5, 4, 8)])
def test_answers_with_drafts_reach_the_end_of_the_context(
    steps: int, branches: int, nodes: int, directory: Path
) -> None:
    """SGLang has the slots for it: a step with so many drafts reserves more of them than one without."""
    prompt, context = prompts_of(CASE)[2], 96
    most = context - len(prompt) - max(steps * branches, nodes)  # SGLang refuses to be asked for more
    tree = {
        "speculative_algorithm": "EAGLE",
        "speculative_num_steps": steps,
        "speculative_eagle_topk": branches,
        "speculative_num_draft_tokens": nodes,
    }
    with serving(directory, context_length=context, **tree) as served:
        for _ in range(2):
            (ours,) = served.greedy([prompt], most)
            assert len(ours) >= most - 2
            assert ours == truth(CASE, prompt, len(ours), 1).tokens


@pytest.mark.parametrize(("steps", "branches", "nodes"), [(1, 3, 3), (2, 2, 5), (3, 3, 8)])
def test_trees_change_no_token(steps: int, branches: int, nodes: int, directory: Path) -> None:
    prompts = prompts_of(CASE)
    tree = {
        "speculative_algorithm": "EAGLE",
        "speculative_num_steps": steps,
        "speculative_eagle_topk": branches,
        "speculative_num_draft_tokens": nodes,
    }
    chains = [truth(CASE, prompt, NEW_TOKENS, min(steps, nodes - 1)) for prompt in prompts]
    with serving(directory, **tree) as served:
        trees = served.speculated(prompts, NEW_TOKENS)
        assert [answer.tokens for answer in trees] == [chain.tokens for chain in chains]
        assert served.greedy(prompts, NEW_TOKENS) == [chain.tokens for chain in chains], "from the cache"
        assert_penalties_are_exact(served)
    taken, alone = (sum(len(each.accepted) for each in them) for them in (trees, chains))
    assert taken < alone, "a tree needs fewer steps than its chain"


def test_the_mtp_layers_tensors_are_read_where_sglang_has_found_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With SGLANG_USE_MODELSCOPE that is another path than the one that was given, which is a repository's name."""
    save_file({"model.mtp.norm.weight": torch.ones(2)}, tmp_path / checkpoint.AUXILIARY_NAME)
    (tmp_path / checkpoint.INDEX_NAME).write_text('{"weight_map": {}}')
    loaded: list[str] = []
    monkeypatch.setattr(LongcatCausalLM, "_is_loaded", lambda _: False)
    monkeypatch.setattr(LongcatCausalLM, "load_weights", lambda _, weights: loaded.extend(name for name, _ in weights))
    with get_context().override_server_args(model_path=str(tmp_path)):
        object.__new__(LongcatFlashMTP).load_weights([])
    assert loaded == ["model.mtp.norm.weight"]


def note_widths(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write down for how many tokens a request the target runs in each verification."""
    from longcat_sglang.devices.cpu.attention import LatentAttentionBackend

    def noted(self: LatentAttentionBackend, forward_batch: Any, in_capture: bool = False) -> None:
        if forward_batch.forward_mode.is_target_verify():
            with file.open("a") as written:
                written.write(f"{forward_batch.spec_info.draft_token_num}\n")
        prepare(self, forward_batch, in_capture)

    prepare = LatentAttentionBackend.init_forward_metadata_out_graph
    monkeypatch.setattr(LatentAttentionBackend, "init_forward_metadata_out_graph", noted)


def test_the_target_runs_on_no_draft_of_a_lone_request_that_is_pruned(gated: Path, tmp_path: Path) -> None:
    prompt, file = prompts_of(CASE)[2], tmp_path / "widths"
    with serving(gated, draft_tokens=3, broken=partial(note_widths, file), **GATED) as served:
        served.greedy([prompt], NEW_TOKENS)
    steps = steps_of(CASE, prompt, NEW_TOKENS, 3, the_gate())
    assert [int(line) - 1 for line in file.read_text().split()] == [step.verified for step in steps]


def sglangs_own_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "longcat_sglang.speculation.gated_worker", lambda original, *args, **kwargs: original(*args, **kwargs)
    )


def test_sglangs_own_worker_verifies_all_drafts(gated: Path) -> None:
    """If this fails, the hook 'draft gate' may have become unnecessary, or a gate's tests cannot fail."""
    with serving(gated, draft_tokens=3, broken=sglangs_own_worker, **GATED) as served:
        with pytest.raises(AssertionError, match="accepted drafts"):
            assert_drafts_pass_the_gate(served, 3)
        assert_drafts_are_the_references(served, 3)


def test_a_gate_with_something_in_its_way_is_refused(gated: Path) -> None:
    """With SGLang's rejection sampling, drafts are drawn at random."""
    option = {"speculative_use_rejection_sampling": True}
    with pytest.raises(ValueError, match="leave --speculative-use-rejection-sampling out; or leave the draft gate out"):
        configure(gated, **speculation(3), **GATED, **option)
    configure(gated, **speculation(3), **option)


def test_a_gate_that_is_not_asked_for_changes_nothing(gated: Path, tmp_path: Path) -> None:
    file = tmp_path / "widths"
    with serving(gated, draft_tokens=3, broken=partial(note_widths, file)) as served:
        assert_drafts_are_the_references(served, 3)
    assert {int(line) - 1 for line in file.read_text().split()} == {3}


def test_what_is_in_the_way_of_a_gate_is_named() -> None:
    options = {
        "speculative_algorithm": "NEXTN",
        "speculative_adaptive": False,
        "speculative_use_rejection_sampling": True,
        "speculative_eagle_topk": 2,
        "enable_dp_attention": True,
    }
    assert deployment.obstacles_to_gate(SimpleNamespace(device="cuda", **options)) == [
        "CUDA graphs verify a fixed number of drafts",
        "speculative_eagle_topk is 2, wanted 1, as it judges chains",
        "speculative_use_rejection_sampling is set; leave --speculative-use-rejection-sampling out",
        "enable_dp_attention is set; leave --enable-dp-attention out",
    ]
