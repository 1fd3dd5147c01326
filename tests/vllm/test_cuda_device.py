"""What vLLM's model is built of on a GPU, as far as a machine without one can tell."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from vllm.distributed.eplb.eplb_state import EplbLayerState

from longcat_core import spellings
from longcat_core.config import RopeConfig
from longcat_core.drafting.gate import DraftGate
from longcat_core.layers import rotary
from longcat_core.reference import LongcatForCausalLM
from longcat_core.weights.audit import CheckpointError
from longcat_vllm import devices, placement
from longcat_vllm.devices.cpu.device import Cpu
from longcat_vllm.devices.cuda.device import Cuda
from tests.cases import DEFAULT, Case, in_dtype, write_checkpoint
from tests.core.test_rotary import ROPES, config_of
from tests.engines.test_bad_checkpoints import CASE, refusal
from tests.oracle import relative_error
from tests.vllm.engine import GATED, serving

NANO = Path(__file__).parents[2] / "longcat_nano" / "checkpoint"
YARN = RopeConfig(theta=1e4, factor=4.0, original_max_position_embeddings=128, mscale=1.0, mscale_all_dim=0.8)


class Facts(NamedTuple):
    """Of a model in bf16, with YaRN."""

    backends: set[type]
    scales: set[float]
    softmax_scale: float
    router_dtypes: set[torch.dtype]
    router_error: float


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    case = Case(replace(DEFAULT, rope=YARN))
    tensors = in_dtype(case.published(), torch.bfloat16)
    with serving(write_checkpoint(tmp_path_factory.mktemp("bf16"), case.config, tensors), dtype="bfloat16") as served:
        layers = served.model.model.layers
        attentions = [attention.attn for layer in layers for attention in layer.self_attn]
        router = layers[0].mlp.router
        hidden = torch.randn(9, DEFAULT.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
        exact = hidden.double() @ tensors["model.layers.0.mlp.router.classifier.weight"].double().T
        return Facts(
            backends={attention.get_attn_backend() for attention in attentions},
            scales={attention.scale for attention in attentions},
            softmax_scale=case.config.softmax_scale,
            router_dtypes={parameter.dtype for parameter in router.parameters()},
            router_error=relative_error(router(hidden), exact),
        )


def test_a_gpu_has_vllms_own_attention_and_a_cpu_ours(facts: Facts) -> None:
    assert Cuda().attention_backend() is None
    assert facts.backends == {Cpu().attention_backend()}


def test_the_softmax_scale_is_cores(facts: Facts) -> None:
    assert facts.scales == {facts.softmax_scale}
    assert facts.softmax_scale != DEFAULT.softmax_scale


def test_the_router_of_a_model_in_bf16_is_in_fp32(facts: Facts) -> None:
    assert facts.router_dtypes == {torch.float32}
    assert facts.router_error < 1e-6


def test_no_kernel_routes_by_itself() -> None:
    """Such kernels are told how, by this; they would choose among FFN experts alone."""
    from vllm.model_executor.layers.fused_moe.config import RoutingMethodType

    from longcat_vllm.moe import PrecomputedRouting

    assert PrecomputedRouting(4, 8).routing_method_type is RoutingMethodType.Unspecified


def test_a_gate_is_where_the_drafter_is(gated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    move = DraftGate.to

    def noting(gate: DraftGate, device: torch.device) -> DraftGate:
        asked.append(torch.device(device))
        return move(gate, device)

    monkeypatch.setattr(DraftGate, "to", noting)
    with serving(gated, draft_tokens=2, **GATED) as served:
        assert asked == [served.llm.llm_engine.vllm_config.device_config.device]


def test_a_gate_is_not_for_the_second_model_runner() -> None:
    from longcat_vllm.deployment import obstacles_to_gate

    scheduler = SimpleNamespace(async_scheduling=False, scheduler_cls=None)
    speculation = SimpleNamespace(
        method="mtp", draft_sample_method="greedy", num_speculative_tokens_per_batch_size=None
    )
    config: Any = SimpleNamespace(use_v2_model_runner=True, scheduler_config=scheduler, speculative_config=speculation)
    (obstacle,) = obstacles_to_gate(config)
    assert "set VLLM_USE_V2_MODEL_RUNNER=0" in obstacle
    config.use_v2_model_runner = False
    assert obstacles_to_gate(config) == []


@pytest.mark.parametrize("chosen", ["TritonExperts", "FlashInferExperts", "TrtLlmExperts"])
def test_doctor_says_of_which_deployment_it_speaks_and_what_has_to_be_compiled(
    chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks vLLM for one rank; a transport may bring other kernels. vLLM's choice is taken if it is known."""
    monkeypatch.setattr("longcat_vllm.devices.cuda.device.engine_choice", lambda *_: ("FLASH_ATTN_MLA", chosen))
    (experts,) = (finding.value for finding in Cuda().implementations(None) if finding.subject == "MoE")
    assert experts.startswith("TritonExperts" if chosen == "TrtLlmExperts" else chosen)
    assert "on one rank, unless --moe-backend, or --all2all-backend of several, says otherwise" in experts
    assert ("vllm download-kernels" in experts) is (chosen == "FlashInferExperts")


def moved(ours: dict[str, Any], redundant: int = 0, load_format: str = "auto", v2: bool = True, **changes: Any) -> Any:
    """Eight ranks with --enable-eplb, and what is asked of us."""
    plain = {"tensor_parallel_size": 8, "data_parallel_size": 1, "prefill_context_parallel_size": 1}
    plain |= {"pipeline_parallel_size": 1, "enable_expert_parallel": True, "enable_eplb": True}
    plain |= {"enable_elastic_ep": False, "eplb_config": SimpleNamespace(num_redundant_experts=redundant)}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**plain | changes),
        additional_config={"longcat": ours},
        load_config=SimpleNamespace(load_format=load_format),
        model_config=SimpleNamespace(runner_type="generate"),
        use_v2_model_runner=v2,
    )


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({"ours": {}, "redundant": 3}, "8 FFN experts and 3 redundant ones, wanted a multiple of the 8 ranks that sha"),
        ({"ours": {"init_expert_location": "places.json"}}, "vLLM begins with experts in their order; leave --addit"),
        ({"ours": {}, "load_format": "sharded_state"}, "where they were when it was saved; leave --load-format out"),
        ({"ours": {}, "enable_elastic_ep": True}, "leave --enable-elastic-ep out, or leave it out"),
        ({"ours": {}, "pipeline_parallel_size": 2, "v2": False}, "experts of the last stage only; leave --pipeline-p"),
        ({"ours": {"eplb": {}}}, "it is for CPUs, for which vLLM has none; give --enable-eplb and --eplb-config"),
    ],
)
def test_moves_of_experts_that_vllm_would_get_wrong_are_refused(
    asked: dict[str, Any], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "current", Cuda)
    with pytest.raises(ValueError, match=wanted):
        placement.settle(moved(**asked), DEFAULT)


def test_experts_move_by_vllms_own_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "current", Cuda)
    placement.settle(moved({}), DEFAULT)
    placement.settle(moved({}, redundant=8, pipeline_parallel_size=2), DEFAULT)
    ids, state = torch.tensor([[0, -1]]), EplbLayerState()
    assert Cuda().balanced(ids, state) is ids, "which vLLM's router places, as the dry run shows"


def test_a_quantised_model_is_refused_on_a_cpu(checkpoint_of: Callable[[Case], Path]) -> None:
    """Where vLLM's own class, which serves it on a GPU, does not run."""
    assert "quantization: 'fp8', wanted none" in refusal(checkpoint_of(CASE), quantization="fp8")


HANDED_OVER = [
    name
    for name, rope in ROPES.items()
    if rope.attention_factor is None and rope.truncate and bool(rope.mscale) == bool(rope.mscale_all_dim)
]
"""vLLM's class for DeepSeek, which its own LongCat takes, reads the others otherwise than transformers."""


@pytest.mark.parametrize("rope", HANDED_OVER)
def test_what_is_left_to_vllms_own_class_has_cores_rotary_table(rope: str) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    config = config_of(ROPES[rope], 64)
    handed_over = dict(spellings.for_transformers(spellings.published(config))["rope_parameters"])
    if handed_over["rope_type"] != "default":
        handed_over["rope_type"] = "deepseek_yarn"
    with set_current_vllm_config(VllmConfig()):
        theirs = get_rope(64, max_position=4096, rope_parameters=handed_over, is_neox_style=False, dtype=torch.float32)
    table = theirs.cos_sin_cache[:4096]
    frequencies, factor = rotary.inverse_frequencies(config), rotary.attention_factor(config.rope)
    cos, sin = rotary.cos_sin(torch.arange(len(table)), frequencies, factor)
    torch.testing.assert_close(table, torch.cat((cos, sin), dim=-1), atol=1e-4, rtol=1e-4)


def test_packed_weights_of_experts_are_not_written_over(checkpoint_of: Callable[[Case], Path]) -> None:
    """By a call of `load_weights`, as trainers make; vLLM's own `reload_weights` unpacks them first."""
    experts = {
        name: tensor for name, tensor in CASE.published().items() if name.startswith("model.layers.0.mlp.experts")
    }
    with serving(checkpoint_of(CASE)) as served:
        with pytest.raises(CheckpointError, match="update them with vLLM's reload_weights"):
            served.model.load_weights(list(experts.items())[:1])
        served.update(experts)


def test_an_embedding_is_the_normed_hidden_state_of_the_last_token() -> None:
    """Of Nano, as vLLM's pooling wants a tokenizer."""
    prompt = list(range(5, 25))
    pooling = {"runner": "pooling", "convert": "embed", "skip_tokenizer_init": False}
    with serving(NANO, max_logprobs=None, **pooling) as served:
        (output,) = served.llm.embed([{"prompt_token_ids": prompt}], use_tqdm=False)
    with torch.no_grad():
        _, hidden, _ = LongcatForCausalLM.from_checkpoint(NANO)(torch.tensor([prompt]))
    exact = torch.nn.functional.normalize(hidden[0, -1].float(), dim=-1)
    assert relative_error(torch.tensor(output.outputs.embedding), exact) < 1e-4


def test_a_classifier_is_refused_on_a_cpu(checkpoint_of: Callable[[Case], Path]) -> None:
    assert "convert: 'classify', wanted none" in refusal(checkpoint_of(CASE), runner="pooling", convert="classify")
