"""What SGLang's model is built of on a GPU, as far as a machine without one can tell."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA

from longcat_core.config import RopeConfig
from longcat_sglang import model, moe, mtp
from longcat_sglang.devices.cuda.device import Cuda
from tests.cases import DEFAULT, Case, in_dtype, write_checkpoint
from tests.oracle import relative_error
from tests.sglang.engine import serving

YARN = RopeConfig(theta=1e4, factor=4.0, original_max_position_embeddings=128, mscale=1.0, mscale_all_dim=0.8)


def note_facts(file: Path, patch: pytest.MonkeyPatch) -> None:
    """Of the model when it is loaded, in SGLang's process, as JSON."""

    def loaded(self: Any) -> None:
        post_load_weights(self)
        attentions = [each for each in self.modules() if isinstance(each, model.LongcatAttention)]
        experts = [each.experts for each in self.modules() if isinstance(each, moe.LongcatMoE)]
        router = self.model.layers[0].mlp.router
        hidden = torch.randn(9, DEFAULT.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
        exact = hidden.double() @ router.classifier.weight.double().T
        facts = {
            "scales": sorted({m.scaling for a in attentions for m in a.modules() if hasattr(m, "scaling")}),
            "absorbed": all(
                a.w_kc.transpose(1, 2).is_contiguous() and a.w_vc.transpose(1, 2).is_contiguous() for a in attentions
            ),
            "inplace": [each.moe_runner_config.inplace for each in experts],
            "num_experts": [each.moe_runner_config.num_experts for each in experts],
            "num_local_experts": [each.moe_runner_config.num_local_experts for each in experts],
            "router_dtypes": sorted({str(parameter.dtype) for parameter in router.parameters()}),
            "router_error": relative_error(router(hidden), exact),
        }
        file.write_text(json.dumps(facts))

    post_load_weights = model.LongcatFlashForCausalLM.post_load_weights
    patch.setattr(model.LongcatFlashForCausalLM, "post_load_weights", loaded)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a model in bf16, with YaRN."""
    directory, case = tmp_path_factory.mktemp("bf16"), Case(replace(DEFAULT, rope=YARN))
    write_checkpoint(directory / "checkpoint", case.config, in_dtype(case.published(), torch.bfloat16))
    file = directory / "facts.json"
    with serving(directory / "checkpoint", dtype="bfloat16", broken=partial(note_facts, file)):
        return json.loads(file.read_text())


def test_every_attention_of_sglang_has_cores_softmax_scale(facts: dict[str, Any]) -> None:
    """Its layer has one for short prompts, `attn_mha`, and one for the rest, `attn_mqa`."""
    (scale,) = facts["scales"]
    assert scale == pytest.approx(replace(DEFAULT, rope=YARN).softmax_scale)
    assert scale != pytest.approx(DEFAULT.softmax_scale)


def test_absorbed_weights_are_laid_out_as_sglang_lays_them_out(facts: dict[str, Any]) -> None:
    assert facts["absorbed"]


def test_the_router_of_a_model_in_bf16_is_in_fp32(facts: dict[str, Any]) -> None:
    assert facts["router_dtypes"] == ["torch.float32"]
    assert facts["router_error"] < 1e-6


def test_sglangs_triton_runner_looks_for_zero_experts_where_a_rank_has_all_experts(facts: dict[str, Any]) -> None:
    """Its own predicate, in moe_runner/triton.py: `filter_expert`."""
    for num_experts, local in zip(facts["num_experts"], facts["num_local_experts"], strict=True):
        assert local == DEFAULT.n_routed_experts
        assert num_experts is None or num_experts != local


def test_experts_do_not_write_into_their_input(facts: dict[str, Any]) -> None:
    """The dense branch reads it afterwards."""
    assert set(facts["inplace"]) == {False}


@pytest.mark.parametrize("rank", [0, 1])
def test_sglangs_dispatcher_hands_zero_experts_on_where_ranks_share_experts(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks ids up in a table: `topk_ids_local = local_expert_mapping[topk_ids]` (token_dispatcher/standard.py)."""
    parallel = SimpleNamespace(moe_ep_size=2, moe_ep_rank=rank)
    monkeypatch.setattr(moe, "get_parallel", lambda: parallel)
    monkeypatch.setattr(moe, "get_moe_a2a_backend", lambda: SimpleNamespace(is_none=lambda: True))
    monkeypatch.setattr(moe, "get_device", lambda: "cpu")
    experts: Any = SimpleNamespace(moe_runner_config=SimpleNamespace(), dispatcher=SimpleNamespace())
    moe._skip_zero_experts(experts, DEFAULT)
    half = DEFAULT.n_routed_experts // 2
    ids = torch.tensor([[-1, 0, half - 1, half], [DEFAULT.n_routed_experts - 1, -1, 1, -1]])
    found = experts.dispatcher.local_expert_mapping[ids]
    mine = (ids >= rank * half) & (ids < (rank + 1) * half)
    assert torch.equal(found.long(), torch.where(mine, ids - rank * half, -1))


@pytest.mark.parametrize(("has_transport", "reduces"), [(False, 1), (True, 0)])
def test_outputs_are_reduced_once(has_transport: bool, reduces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transport of tokens to experts, as DeepEP, brings them back whole."""
    reduced: list[torch.Tensor] = []
    monkeypatch.setattr(moe, "get_parallel", lambda: SimpleNamespace(tp_size=2))
    monkeypatch.setattr(moe, "get_moe_a2a_backend", lambda: SimpleNamespace(is_none=lambda: not has_transport))
    monkeypatch.setattr(moe, "tensor_model_parallel_all_reduce", lambda x: reduced.append(x) or x)
    monkeypatch.setattr(moe.LongcatMoE, "_report", lambda *_: None)
    layer = moe.LongcatMoE.__new__(moe.LongcatMoE)
    torch.nn.Module.__init__(layer)
    layer.config = DEFAULT
    layer.router = torch.nn.Linear(DEFAULT.hidden_size, DEFAULT.num_experts)
    layer.router.e_score_correction_bias = torch.zeros(DEFAULT.num_experts)
    layer.experts = lambda hidden_states, _: torch.zeros_like(hidden_states)
    with torch.no_grad():
        layer(torch.randn(3, DEFAULT.hidden_size))
    assert len(reduced) == reduces


def test_a_gpus_attention_is_sglangs_own_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(DeepseekV2AttentionMLA, "forward", lambda *given: calls.append(given) or "attended")
    monkeypatch.setattr(model.devices, "current", Cuda)
    attention = model.LongcatAttention.__new__(model.LongcatAttention)
    given: list[Any] = ["positions", "hidden_states", "forward_batch", "zeros"]
    assert model.LongcatAttention.forward(attention, *given, cos="cos", sin="sin") == "attended"
    assert calls == [(attention, *given)]


def test_an_attention_may_take_a_zero_for_each_absorbed_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang asks for one where it multiplies with `w_kc`, and for one at `w_vc`, if they are in FP8."""
    import inspect

    from sglang.srt.models.deepseek_common.attention_forward_methods import forward_mla

    assert inspect.getsource(forward_mla).count("zero_allocator.allocate(1)") == model.ZEROS_OF_AN_ATTENTION
    sizes: list[int] = []
    monkeypatch.setattr(model, "BumpAllocator", lambda size, **_: sizes.append(size))
    monkeypatch.setattr(model, "residual_batch", SimpleNamespace(start=lambda _: None, norm=lambda x, *_, **__: x))
    stack = model.LongcatModel.__new__(model.LongcatModel)
    torch.nn.Module.__init__(stack)
    stack.layers = [lambda hidden_states, *_: hidden_states] * 3
    stack.inverse_frequencies, stack.attention_factor, stack.norm = torch.ones(2), 1.0, None
    stack(None, torch.zeros(1, dtype=torch.int64), SimpleNamespace(), input_embeds=torch.zeros(1, 4))
    assert sizes == [3 * 2 * model.ZEROS_OF_AN_ATTENTION]


def test_the_head_is_of_the_group_that_shares_attention_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(model, "hooks", SimpleNamespace(install=lambda _: None))
    monkeypatch.setattr(model, "devices", SimpleNamespace(current=Cuda))
    monkeypatch.setattr(model, "LongcatModel", lambda *_: torch.nn.Identity())
    monkeypatch.setattr(model, "LogitsProcessor", lambda _: torch.nn.Identity())
    monkeypatch.setattr(model, "ParallelLMHead", lambda *_, **named: given.update(named) or torch.nn.Identity())
    for enabled in (True, False):
        monkeypatch.setattr(model, "get_parallel", lambda enabled=enabled: SimpleNamespace(enable_dp_lm_head=enabled))
        model.LongcatFlashForCausalLM(SimpleNamespace(longcat=DEFAULT))
        assert given["use_attn_tp_group"] is enabled


def test_places_are_for_ffn_experts_alone() -> None:
    found = model.LongcatFlashForCausalLM.get_model_config_for_expert_location(SimpleNamespace(longcat=DEFAULT))
    assert (found.num_layers, found.num_logical_experts) == (DEFAULT.num_layers, DEFAULT.n_routed_experts)


@pytest.mark.parametrize("module", ["self_attn", "mlps", "mtp", None])
def test_modules_that_a_release_leaves_in_bf16_get_no_quantisation(
    module: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, set[Any]] = {}

    def standing_for(name: str) -> Callable[..., Any]:
        def make(*args: Any, **_: Any) -> Any:
            given.setdefault(name, set()).update({"fp8"} & {each for each in args if isinstance(each, str)})
            made = torch.nn.Identity()
            made.prepare_qkv_latent = None
            return made

        return make

    for name in ("LongcatAttention", "LongcatFFN", "LongcatMoE", "RMSNorm"):
        monkeypatch.setattr(model, name, standing_for(name))
    stage = SimpleNamespace(declaration=None)
    monkeypatch.setattr(model, "make_stages", lambda *stages, **_: (stage,) * len(stages))
    config = replace(DEFAULT, disable_quant_module=(module,) if module else ())
    hf_config: Any = SimpleNamespace(longcat=config)
    model.LongcatDecoderLayer(hf_config, 0, "fp8", "layers.0", None, None)
    quantised = {name for name, configs in given.items() if configs == {"fp8"}}
    expected = {"LongcatAttention", "LongcatFFN", "LongcatMoE"}
    assert quantised == expected - {{"self_attn": "LongcatAttention", "mlps": "LongcatFFN"}.get(str(module), "")}
    monkeypatch.setattr(mtp, "LongcatMTPModel", lambda _, quant_config, __: given.update(mtp={quant_config}))
    monkeypatch.setattr(model, "LogitsProcessor", lambda _: torch.nn.Identity())
    mtp.LongcatFlashMTP(hf_config, "fp8")
    assert given["mtp"] == {None if module == "mtp" else "fp8"}
