"""LoRA: a request with an adapter is answered as by a checkpoint into which the adapter is merged."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longcat_core.plugin.hooks import Stage
from longcat_core.reference import LongcatForCausalLM
from longcat_core.weights import names
from tests.cases import CASES, Case, drafting_tensors
from tests.engines.test_bad_checkpoints import refusal
from tests.oracle import relative_error
from tests.vllm.engine import Engine, serving

CASE = CASES["default"]
PROMPTS = [CASE.prompts(1, length, seed=length)[0] for length in (3, 40)]
NEW_TOKENS, RANK, ALPHA = 8, 4, 12
ATTENTION = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj")
DENSE = ("gate_proj", "up_proj", "down_proj")
UPDATED = "model.layers.0.self_attn.1.q_b_proj.weight"
"""Of a module that adapters change."""


def adapter_of(projections: tuple[str, ...], seed: int) -> dict[str, Tensor]:
    """Random A and B for every such projection of the attentions and dense FFNs, by their published modules."""
    generator = torch.Generator().manual_seed(seed)
    matrices: dict[str, Tensor] = {}
    for name, shape in names.expected_tensors(CASE.config, with_mtp=False).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in projections and ".experts." not in module:
            matrices[f"{module}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=generator) * shape[1] ** -0.5
            matrices[f"{module}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) * 0.1
    return matrices


def merged(tensors: dict[str, Tensor], adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + alpha / rank * B @ A."""
    changed = dict(tensors)
    for name, a in adapter.items():
        module, is_a, _ = name.partition(".lora_A.weight")
        if is_a:
            changed[f"{module}.weight"] = (
                tensors[f"{module}.weight"] + ALPHA / RANK * adapter[f"{module}.lora_B.weight"] @ a
            )
    return changed


def write_adapter(directory: Path, matrices: dict[str, Tensor]) -> Path:
    """As PEFT does."""
    directory.mkdir(parents=True)
    targets = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in matrices})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in matrices.items()},
        directory / "adapter_model.safetensors",
    )
    return directory


def request(number: int, directory: Path) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(directory.name, number, str(directory))


def answers(served: Engine, adapters: list[Any]) -> list[Any]:
    """All prompts with each adapter, in one batch; greedy, with the log-probabilities of the prompts."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, prompt_logprobs=-1
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS for _ in adapters]
    return served.llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapters * len(PROMPTS))


@torch.no_grad()
def assert_answers_are_the_references(outputs: list[Any], tensors: dict[str, Tensor]) -> None:
    model = LongcatForCausalLM(CASE.config)
    model.load_published(tensors)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == model.generate(prompt, NEW_TOKENS)
        ours = [[row[token].logprob for token in range(CASE.config.vocab_size)] for row in output.prompt_logprobs[1:]]
        truth = model(torch.tensor([prompt]))[0][0, :-1].log_softmax(dim=-1)
        assert relative_error(torch.tensor(ours), truth) < 1e-4


def test_adapters_and_the_model_itself_are_served_in_one_batch_with_drafts(
    drafting_checkpoint_of: Callable[[Case], Path], tmp_path: Path
) -> None:
    """And after an update of the weights, and after adapters that are refused."""
    tensors = drafting_tensors(CASE.config)
    both, dense = adapter_of(ATTENTION + DENSE, seed=1), adapter_of(DENSE[1:], seed=2)
    loaded = [request(1, write_adapter(tmp_path / "both", both)), request(2, write_adapter(tmp_path / "dense", dense))]
    with serving(
        drafting_checkpoint_of(CASE), draft_tokens=3, enable_lora=True, max_loras=2, max_lora_rank=8
    ) as served:
        outputs = answers(served, [None, *loaded])
        refused = request(3, write_adapter(tmp_path / "absorbed", adapter_of(("kv_b_proj",), seed=3)))
        with pytest.raises(ValueError, match=r"changes model.layers.0.self_attn.0.kv_b_proj, wanted q_a_proj"):
            served.llm.llm_engine.add_lora(refused)
        served.update({UPDATED: 0.5 * tensors[UPDATED]})
        updated = answers(served, [None, *loaded])
    assert_answers_are_the_references(outputs[0::3], tensors)
    assert_answers_are_the_references(outputs[1::3], merged(tensors, both))
    assert_answers_are_the_references(outputs[2::3], merged(tensors, dense))
    tensors |= {UPDATED: 0.5 * tensors[UPDATED]}
    assert_answers_are_the_references(updated[0::3], tensors)
    assert_answers_are_the_references(updated[1::3], merged(tensors, both))


def test_an_adapters_part_of_a_sum_over_ranks_is_in_it_once(
    checkpoint_of: Callable[[Case], Path], tmp_path: Path
) -> None:
    """Two ranks; the second dense FFN's sum has the experts' as well."""
    adapter = adapter_of(ATTENTION + DENSE, seed=1)
    loaded = request(1, write_adapter(tmp_path / "adapter", adapter))
    with serving(checkpoint_of(CASE), tensor_parallel=2, enable_lora=True, max_lora_rank=8) as served:
        outputs = answers(served, [None, loaded])
    assert_answers_are_the_references(outputs[0::2], CASE.published())
    assert_answers_are_the_references(outputs[1::2], merged(CASE.published(), adapter))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("model.layers.1.self_attn.0.kv_b_proj.lora_A.weight", "changes model.layers.1.self_attn.0.kv_b_proj, wanted"),
        ("model.layers.0.mlp.experts.3.up_proj.lora_B.weight", "not known to skip zero experts"),
        ("model.layers.0.mlp.experts.base_layer.lora_A.weight", "not known to skip zero experts"),
        ("model.layers.0.mlp.experts.lora_A.weight", "not known to skip zero experts"),
        ("model.layers.0.mlp.router.classifier.lora_A.weight", "the router is computed in fp32"),
        ("model.layers.2.self_attn.0.o_proj.lora_A.weight", "that the model has"),
        ("model.embed_tokens.lora_embedding_A", "that the model has"),
        ("lm_head.lora_B.weight", "that the model has"),
    ],
)
def test_an_adapter_that_wants_what_it_would_not_get_is_refused(tensor: str, message: str) -> None:
    """vLLM would ignore it without a word."""
    from longcat_vllm.adapters import AdapterNames

    with pytest.raises(ValueError, match=re.escape(message)):
        AdapterNames(config=CASE.config).get_rename_mapper().map_name(tensor)


def test_target_modules_that_no_adapter_can_change_are_refused(checkpoint_of: Callable[[Case], Path]) -> None:
    directory = checkpoint_of(CASE)
    wanted = ["o_proj", "gate_up_proj", "kv_b_proj", "model.layers.0.mlp.experts"]
    message = refusal(directory, enable_lora=True, lora_target_modules=wanted)
    assert "lora_target_modules: 'kv_b_proj', wanted q_a_proj" in message
    assert "lora_target_modules: 'model.layers.0.mlp.experts', wanted" in message
    assert "'o_proj'" not in message
    assert "'gate_up_proj'" not in message


@pytest.mark.parametrize("architecture", ["LongcatFlashForCausalLM", "LlamaForCausalLM"])
def test_requests_without_an_adapter_are_kept_from_it_in_a_longcat_alone(architecture: str) -> None:
    """Another model in the same process has what vLLM gives it."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from longcat_vllm import hooks, register

    register()
    hooks.install(Stage.MODEL)
    manager: Any = SimpleNamespace(
        model=None, max_num_seqs=2, device=torch.device("cpu"), lora_config=None, punica_wrapper_mapping={}
    )
    config: Any = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture])))
    LoRAModelManager._init_punica_wrapper(manager, 8, config)
    (punica,) = manager.punica_wrapper_mapping.values()
    assert type(punica) is PunicaWrapperCPU
    punica.update_metadata(LoRAMapping((0, 1), (0, 1), is_prefill=True), [1], 2, 100)
    shrunk = torch.zeros(2, 1)
    punica.add_shrink((shrunk,), torch.ones(2, 1), (torch.ones(1, 1, 1, 1),), 1.0)
    assert shrunk.flatten().tolist() == [0 if architecture.startswith("Longcat") else 1, 1]


def test_vllm_still_adds_an_adapter_to_requests_without_one_on_a_cpu() -> None:
    """If this fails, the hook for requests without an adapter may have become unnecessary."""
    from vllm.lora.ops.torch_ops import sgmv_shrink

    shrunk = torch.zeros(2, 1)
    indices, lengths = torch.tensor([-1, 0]), torch.tensor([1, 1])
    sgmv_shrink(torch.ones(2, 1), torch.ones(1, 1, 1, 1), shrunk, lengths.cumsum(0), lengths, indices, 2, 1, 2, 1.0)
    assert shrunk.flatten().tolist() == [1, 1]
