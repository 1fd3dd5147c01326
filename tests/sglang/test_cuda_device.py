"""What SGLang's model is built of on a GPU, as far as a machine without one can tell."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.model_runner_components.weight_updater import _unsupported_derived_weight_cache_error
from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA

from longcat_core.config import LongcatConfig, RopeConfig
from longcat_core.layers.routing import RouterFunctions, route
from longcat_core.plugin.requested import Requested
from longcat_core.quantization import Quantization
from longcat_core.weights.blocks import FP8
from longcat_core.weights.names import MTP_PREFIX
from longcat_sglang import devices, model, moe, mtp, quantization
from longcat_sglang.attention import LongcatAttention
from longcat_sglang.devices.cpu.device import Cpu
from longcat_sglang.devices.cuda.device import Cuda, SglangFp8Kernels
from longcat_sglang.devices.unknown import Unknown
from longcat_sglang.quantization import LongcatFp8Config
from tests.cases import DEFAULT, Case, in_dtype, write_checkpoint
from tests.fp8 import CONFIG
from tests.oracle import relative_error
from tests.sglang.engine import serving

YARN = RopeConfig(theta=1e4, factor=4.0, original_max_position_embeddings=128, mscale=1.0, mscale_all_dim=0.8)


def note_facts(file: Path, patch: pytest.MonkeyPatch) -> None:
    """Of the model when it is loaded, in SGLang's process, as JSON."""

    def loaded(self: Any) -> None:
        post_load_weights(self)
        attentions = [each for each in self.modules() if isinstance(each, LongcatAttention)]
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


@pytest.mark.parametrize("redundant", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_sglangs_dispatcher_hands_zero_experts_on_where_ranks_share_experts(
    rank: int, redundant: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks ids up in a table: `topk_ids_local = local_expert_mapping[topk_ids]` (token_dispatcher/standard.py)."""
    parallel = SimpleNamespace(moe_ep_size=2, moe_ep_rank=rank)
    monkeypatch.setattr(moe, "get_parallel", lambda: parallel)
    monkeypatch.setattr(moe, "get_moe_a2a_backend", lambda: SimpleNamespace(is_none=lambda: True))
    monkeypatch.setattr(moe, "get_device", lambda: "cpu")
    places = DEFAULT.n_routed_experts + redundant
    experts: Any = SimpleNamespace(moe_runner_config=SimpleNamespace(), dispatcher=SimpleNamespace(), quant_method=None)
    experts.num_experts = places
    moe._skip_zero_experts(experts, DEFAULT)
    assert experts.moe_runner_config.num_experts == places + DEFAULT.zero_expert_num
    half = places // 2
    ids = torch.tensor([[-1, 0, half - 1, half], [places - 1, -1, 1, -1]])
    found = experts.dispatcher.local_expert_mapping[ids]
    mine = (ids >= rank * half) & (ids < (rank + 1) * half)
    assert torch.equal(found.long(), torch.where(mine, ids - rank * half, -1))


@pytest.mark.parametrize("has_transport", [False, True])
def test_what_a_transport_has_brought_back_is_not_summed_again(
    has_transport: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepEP brings back the whole output of a token's experts; else a rank has a part of it."""
    monkeypatch.setattr(moe, "get_moe_a2a_backend", lambda: SimpleNamespace(is_none=lambda: not has_transport))
    monkeypatch.setattr(moe.LongcatMoE, "note", lambda *_: None)
    monkeypatch.setattr(moe.placement, "place_ids", lambda ids, _: ids)
    layer = moe.LongcatMoE.__new__(moe.LongcatMoE)
    torch.nn.Module.__init__(layer)
    layer.config, layer.layer_id, layer.route = DEFAULT, 0, route
    layer.router = torch.nn.Linear(DEFAULT.hidden_size, DEFAULT.num_experts, bias=False)
    vars(layer.router)["bias"] = torch.zeros(DEFAULT.num_experts)
    layer.experts = lambda hidden_states, _: torch.ones_like(hidden_states)
    hidden_states = torch.randn(3, DEFAULT.hidden_size)
    with torch.no_grad():
        partial, whole = layer(hidden_states)
        layer.experts = lambda hidden_states, _: torch.zeros_like(hidden_states)
        zero_experts = layer(hidden_states).whole
    assert zero_experts.any()
    torch.testing.assert_close(whole, zero_experts + 1 if has_transport else zero_experts)
    assert (partial is None) is has_transport
    assert partial is None or bool((partial == 1).all())


def test_a_step_of_one_token_keeps_its_kernel_under_torch_compile() -> None:
    """SGLang's products in PyTorch take an id of -1 for the last expert."""
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

    method = UnquantizedFusedMoEMethod()
    experts: Any = SimpleNamespace(moe_runner_config=SimpleNamespace(), dispatcher=None, quant_method=method)
    experts.num_experts = DEFAULT.n_routed_experts
    assert method._torch_compile_forward(1) is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "get_parallel", lambda: SimpleNamespace(moe_ep_size=1))
        moe._skip_zero_experts(experts, DEFAULT)
    assert method._torch_compile_forward(1) is None


def test_sglangs_products_for_one_token_still_take_an_id_of_minus_one_for_the_last_expert() -> None:
    """If this fails, `_kernel_as_without_torch_compile` may have become unnecessary."""
    from sglang.srt.layers.moe.fused_moe_native import fused_moe_forward_native

    layer: Any = SimpleNamespace(
        moe_runner_config=SimpleNamespace(apply_router_weight_on_input=False, activation="silu"),
        w13_weight=torch.randn(3, 8, 6),
        w2_weight=torch.randn(3, 6, 4),
    )
    hidden_states = torch.randn(1, 6)

    def computed(expert: int) -> torch.Tensor:
        topk_output = (torch.ones(1, 1), torch.tensor([[expert]]), None)
        given: Any = SimpleNamespace(hidden_states=hidden_states, topk_output=topk_output)
        return fused_moe_forward_native(layer, given).hidden_states

    assert torch.equal(computed(-1), computed(2))


def test_sglangs_router_for_hpc_still_shortens_its_weight_and_takes_no_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a GPU's router may take it (docs/differences.md)."""
    from sglang.kernels.ops.gemm import bf16_fp32

    hpc: Any = ModuleType("hpc")
    hpc.get_gemm_bf16xfp32_workspace = torch.zeros
    monkeypatch.setitem(sys.modules, "hpc", hpc)
    monkeypatch.setattr(bf16_fp32, "_hpc_gemm_enabled", True)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    high, low, _ = bf16_fp32._get_bf16xfp32_weight_split(weight)
    error = relative_error(high.double() + low.double() * bf16_fp32._HPC_GEMM_WEIGHT_SCALE, weight.double())
    assert 2**-21 < error < 2**-17
    assert "HPC-Ops" in _unsupported_derived_weight_cache_error()


def test_sglang_still_captures_the_prompts_of_a_drafter_that_has_layers() -> None:
    """Its own has none (docs/drafts.md)."""
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup
    from sglang.srt.models import longcat_flash_nextn

    assert 'while not hasattr(layer_model, "layers")' in inspect.getsource(cuda_graph_setup)
    assert "self.layers" not in inspect.getsource(longcat_flash_nextn)
    assert "self.layers" in inspect.getsource(mtp.LongcatMTPModel)


def test_a_gpus_attention_is_the_two_halves_of_sglangs_own_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    def prepare(self: Any, *given: Any, **named: Any) -> str:
        calls.append(("prepare", [*given, *[value for value in named.values() if value]]))
        return "prepared"

    def core(self: Any, prepared: str) -> str:
        calls.append(("core", prepared))
        return "attended"

    monkeypatch.setattr(DeepseekV2AttentionMLA, "forward_prepare", prepare)
    monkeypatch.setattr(DeepseekV2AttentionMLA, "forward_core", core)
    monkeypatch.setattr(model.devices, "current", Cuda)
    attention = LongcatAttention.__new__(LongcatAttention)
    given: list[Any] = ["positions", "hidden_states", "forward_batch", "zeros"]
    rest = LongcatAttention.project(attention, *given, angles=None)
    assert calls == [("prepare", given)]
    assert rest() == LongcatAttention.forward(attention, *given, angles=None) == "attended"
    assert DeepseekV2AttentionMLA.forward(attention, *given) == "attended"
    assert calls == 3 * [("prepare", given), ("core", "prepared")]


def test_an_attention_may_take_a_zero_for_each_absorbed_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang asks for one where it multiplies with `w_kc`, and for one at `w_vc`, if they are in FP8."""
    from sglang.srt.models.deepseek_common.attention_forward_methods import forward_mla

    assert inspect.getsource(forward_mla).count("zero_allocator.allocate(1)") == model.ZEROS_OF_AN_ATTENTION
    sizes: list[int] = []
    monkeypatch.setattr(model, "BumpAllocator", lambda size, **_: sizes.append(size))
    monkeypatch.setattr(model, "residual_batch", SimpleNamespace(start=lambda _: None, norm=lambda x, *_, **__: x))
    monkeypatch.setattr(model, "devices", SimpleNamespace(current=Cuda))
    stack = model.LongcatModel.__new__(model.LongcatModel)
    torch.nn.Module.__init__(stack)
    stack.layers = [lambda hidden_states, *_: hidden_states] * 3
    stack.norm = None  # and nothing to compute angles of, which SGLang's attention has in its rotary embedding
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


# -- FP8 ---------------------------------------------------------------------------------------------


def fp8_config(
    monkeypatch: pytest.MonkeyPatch,
    config: LongcatConfig,
    drafter: tuple[str, frozenset[str]] | None = None,
    **parallel: int,
) -> LongcatFp8Config:
    """As a model gets it on a GPU of a rank. parallel: sizes of groups of ranks, 1 if not given."""
    sizes = {"tp_size": 1, "attn_tp_size": 1, "moe_tp_size": 1, **parallel}
    monkeypatch.setattr(quantization, "get_parallel", lambda: SimpleNamespace(**sizes))
    monkeypatch.setattr(quantization.devices, "current", Cuda)
    ours = quantization.of_model(Fp8Config.from_config(PUBLISHED), config, model.PACKED, drafter)
    assert ours is not None
    return ours


def methods_of(ours: LongcatFp8Config, *prefixes: str) -> list[type]:
    """Of linear layers with these names."""
    layer = LinearBase(1, 1)
    return [type(ours.get_quant_method(layer, prefix)) for prefix in prefixes]


PUBLISHED = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
LAYER = "model.layers.0"
MODULES = {
    "self_attn": ("self_attn.0.fused_qkv_a_proj_with_mqa", "self_attn.1.q_b_proj", "self_attn.1.o_proj"),
    "mlps": ("mlps.0.gate_up_proj", "mlps.1.down_proj"),
}


@pytest.mark.parametrize("disabled", ["self_attn", "mlps", None])
def test_modules_that_a_release_leaves_in_bf16_get_no_quantisation(
    disabled: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = Quantization("fp8", disabled=(disabled,) if disabled else ())
    ours = fp8_config(monkeypatch, replace(CONFIG, quantization=release))
    for kind, modules in MODULES.items():
        method = UnquantizedLinearMethod if kind == disabled else Fp8LinearMethod
        assert methods_of(ours, *(f"{LAYER}.{module}" for module in modules)) == [method] * len(modules)
    assert ours.keeps_experts(f"{LAYER}.mlp.experts")


def test_the_tensors_of_the_mtp_layer_decide_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules have the names of the model's first layer."""
    weights = frozenset({f"{MTP_PREFIX}layers.0.eh_proj.weight", f"{MTP_PREFIX}layers.0.self_attn.o_proj.weight"})
    ours = fp8_config(monkeypatch, CONFIG, drafter=(LAYER, weights))
    kept = methods_of(ours, f"{LAYER}.eh_proj", f"{LAYER}.self_attn.o_proj")
    assert kept == [Fp8LinearMethod] * 2
    assert methods_of(ours, f"{LAYER}.transformer_layer.mlp.down_proj") == [UnquantizedLinearMethod]


def test_attentions_are_split_over_fewer_ranks_where_they_are_data_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 4 ranks an attention's output would be of 64 columns, and a dense FFN's is."""
    prefixes = [f"{LAYER}.{module}" for module in ("self_attn.0.o_proj", "mlps.0.down_proj")]
    whole = fp8_config(monkeypatch, CONFIG, tp_size=4)
    assert methods_of(whole, *prefixes) == [Fp8LinearMethod, UnquantizedLinearMethod]
    split = fp8_config(monkeypatch, CONFIG, tp_size=4, attn_tp_size=4)
    assert methods_of(split, *prefixes) == [UnquantizedLinearMethod] * 2
    assert split.keeps_experts(f"{LAYER}.mlp.experts")
    assert not fp8_config(monkeypatch, CONFIG, moe_tp_size=4).keeps_experts(f"{LAYER}.mlp.experts")


def test_an_attention_gets_no_scales_of_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = RadixAttention.__new__(RadixAttention)
    assert fp8_config(monkeypatch, CONFIG).get_quant_method(attention, f"{LAYER}.self_attn.0.attn_mqa") is None


def test_scales_of_activations_are_rounded_as_the_release_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fp8_config(monkeypatch, CONFIG).scale_fmt is None
    monkeypatch.setitem(PUBLISHED, "scale_fmt", "ue8m0")
    assert fp8_config(monkeypatch, CONFIG).scale_fmt == "ue8m0"


@pytest.mark.parametrize(
    ("rows", "columns", "backend", "is_taken"),
    [
        ((128, 160), 128, "auto", True),
        ((128, 160), 192, "auto", False),
        ((128, 160), 128, "flashinfer_cutlass", False),
        ((128, 128), 128, "flashinfer_cutlass", True),
    ],
)
def test_sglangs_fp8_kernels_take_whole_blocks_of_columns(
    rows: tuple[int, int], columns: int, backend: str, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_utils, "FP8_GEMM_RUNNER_BACKEND", fp8_utils.Fp8GemmRunnerBackend(backend))
    assert SglangFp8Kernels().take_linear(("q_a_proj", "kv_a_proj_with_mqa"), rows, columns) is is_taken


def test_a_cpu_keeps_nothing_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization.devices, "current", Cpu)
    assert quantization.of_model(Fp8Config.from_config(PUBLISHED), CONFIG, model.PACKED) is None


def fp8_linear(weight: torch.Tensor, scales: torch.Tensor | None) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.quant_method = Fp8LinearMethod(Fp8Config.from_config(PUBLISHED))
    layer.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
    layer.register_parameter(
        "weight_scale_inv", None if scales is None else torch.nn.Parameter(scales, requires_grad=False)
    )
    return layer


def test_weights_that_a_kernel_has_in_its_own_layout_are_not_updated() -> None:
    """As SGLang's `WeightUpdater` asks; of Marlin there are no scales left, of DeepGEMM on Blackwell other ones."""
    weight, scales = torch.zeros(128, 128, dtype=FP8), torch.ones(1, 1)
    rounded = fp8_linear(weight, scales)
    rounded.weight_scale_inv.format_ue8m0 = True
    changed = {
        "marlin": fp8_linear(torch.zeros(8, 256, dtype=torch.int32), None),
        "rounded": rounded,
        "packed": fp8_linear(weight, torch.ones(1, 1, dtype=torch.int32)),
    }
    for name, layer in changed.items():
        target = model.LongcatCausalLM.__new__(model.LongcatCausalLM)
        torch.nn.Module.__init__(target)
        target.published = fp8_linear(weight, scales)
        assert _unsupported_derived_weight_cache_error(target) is None
        target.add_module(name, layer)
        reason = _unsupported_derived_weight_cache_error(target)
        assert reason is not None
        assert reason.startswith(f"1 FP8 weights, {name}.weight the first, are laid out for SGLang's kernels")


# -- our kernels, on request -------------------------------------------------------------------------


def test_a_gpu_has_sglangs_own_experts_and_a_router_in_torch_unless_kernels_are_requested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from longcat_sglang import requested

    monkeypatch.setattr(requested, "current", Requested)
    assert Cuda().expert_arguments(None) == {}
    assert Cuda().router_functions() == RouterFunctions(route)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ""),
        ({"moe_runner_backend": "triton"}, ""),
        ({"moe_runner_backend": "deep_gemm"}, "moe_runner_backend is 'deep_gemm', which is another kernel; leave"),
        ({"speculative_moe_runner_backend": "deep_gemm"}, "speculative_moe_runner_backend is 'deep_gemm', which"),
        ({"moe_a2a_backend": "deepep"}, "moe_a2a_backend is 'deepep', wanted none; leave --moe-a2a-backend out"),
        ({"enable_deterministic_inference": True}, "tiles depend on the batch"),
        ({"dtype": torch.float16}, "dtype torch.float16, wanted"),
        ({"capability": (8, 0)}, "compute capability 8.0, wanted"),
        ({"tp_size": 4, "ep_size": 4}, ""),
        ({"tp_size": 4}, "64 rows of an FP8 expert on a rank, wanted"),
    ],
    ids=str,
)
def test_kernels_that_were_asked_for_and_cannot_be_used(
    changes: dict[str, Any], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longcat_sglang import deployment
    from longcat_sglang.devices.cuda import device

    monkeypatch.setattr(device, "capability", lambda: changes.get("capability", (9, 0)))
    settings = {
        "json_model_override_args": '{"longcat_kernels": true}',
        "tp_size": 1,
        "ep_size": 1,
        "moe_runner_backend": "auto",
        "speculative_moe_runner_backend": None,
        "moe_a2a_backend": "none",
        "enable_deterministic_inference": False,
    }
    fp8 = replace(CONFIG, expert_ffn_hidden_size=256, quantization=Quantization("fp8"))
    given = SimpleNamespace(**{**settings, **changes})
    obstacles = Cuda().obstacles_to_kernels(given, fp8, changes.get("dtype", torch.bfloat16))
    assert len(obstacles) == bool(wanted)
    assert all(obstacle.startswith(wanted) for obstacle in obstacles)
    assert deployment.requested.of(given).kernels


@pytest.mark.parametrize(("name", "is_amds"), [("cuda", True), ("npu", False)])
def test_on_a_device_that_is_not_known_sglangs_own_class_serves(
    name: str, is_amds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs of AMD, which SGLang calls cuda."""
    from sglang.srt import utils

    assert type(devices.of("cuda")) is Cuda
    monkeypatch.setattr(utils, "is_hip", lambda: is_amds)
    device = devices.of(name)
    assert type(device) is Unknown
    why = f"longcat-serving does not know the device '{'rocm' if is_amds else name}'"
    assert device.reasons_for_own_class() == [why]
    assert [finding.value for finding in device.implementations()] == [f"SGLang's own class, as {why}"]
