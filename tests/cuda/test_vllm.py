"""vLLM's CUDA build on the null GPU: what deployments choose and hold, what a step launches, what is refused."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from math import prod

import pytest

from longcat_core import spellings
from longcat_core.planning.dry_run import Report
from longcat_core.weights import names
from tests.cuda.conftest import Reports
from tests.cuda.deployments import DP8, EP8, MODELS, TP8, Deployment, drafts

ALL_REDUCES_A_LAYER = 4
"""Two of attentions, one of the first dense FFN, one of the second and the experts together."""

BF16 = Deployment("8xH200", "chat", EP8)
FP8 = Deployment("8xH200", "chat-fp8", EP8)
FOUR_LAYERS = Deployment("8xH200", "chat-4-layers", EP8)
FP8_CACHE = Deployment("8xH200", "chat-fp8-4-layers", f"{EP8} --kv-cache-dtype fp8")
TENSOR_PARALLEL = Deployment("8xH200", "chat-4-layers", TP8)
LITE = Deployment("8xH200", "lite-trunk", "")
DATA_PARALLEL = Deployment("8xH200", "chat-fp8-4-layers", DP8)
MTP = [
    Deployment("8xH200", "chat-fp8-4-layers", f"{EP8} {drafts(number)}", v2_model_runner=is_v2)
    for number, is_v2 in ((3, True), (1, False))
]
LAST_STAGE = Deployment("8xH200", "chat-fp8-4-layers", "--pipeline-parallel-size 2 --tensor-parallel-size 4", rank=4)
OURS = Deployment("8xH200", "chat-4-layers", f'{EP8} --additional-config {{"longcat":{{"kernels":true}}}}')
FLASHINFER_MLA = f'{EP8} --additional-config {{"longcat":{{"flashinfer_mla":true}}}}'
OURS_MLA = Deployment("8xH200", "chat-4-layers", f"{FLASHINFER_MLA} {drafts(1)}")
OURS_MLA_FP8 = Deployment("8xH200", "chat-fp8-4-layers", f"{FLASHINFER_MLA} --kv-cache-dtype fp8")
OVERLAP = '--additional-config {"longcat":{"overlap":true}}'
BESIDE = {
    Deployment("8xH200", "chat-4-layers", f"{EP8} {OVERLAP}"): ("experts", "routing", "activation"),
    Deployment("8xH200", "chat-fp8-4-layers", f"{DP8} {OVERLAP}"): ("experts", "collective"),
    Deployment("8xH200", "chat-4-layers", f"{TP8} {OVERLAP}", v2_model_runner=False): ("experts", "routing"),
}
"""Deployments whose experts run beside the dense path, and kinds of kernels that are then on the second stream."""
MOVING = Deployment("8xH200", "chat-fp8-4-layers", f'{EP8} --enable-eplb --eplb-config {{"num_redundant_experts":32}}')
BLACKWELL = Deployment("8xB200", "chat-4-layers", EP8)
BLACKWELL_FP8 = Deployment("8xB200", "chat-fp8-4-layers", EP8)
RUNNING = [FP8, FOUR_LAYERS, FP8_CACHE, TENSOR_PARALLEL, LITE, DATA_PARALLEL, *MTP, LAST_STAGE]
RUNNING += [OURS, OURS_MLA, OURS_MLA_FP8, MOVING, BLACKWELL, BLACKWELL_FP8, *BESIDE]


def name_of(deployment: Deployment) -> str:
    runner = "" if deployment.v2_model_runner else ", V1"
    return f"{deployment.machine} {deployment.model} {deployment.options} rank {deployment.rank}{runner}"


def launches(report: Report, step: str, layer: int, kernel: str) -> int:
    """Of the kernels whose name has `kernel` in it, in one layer."""
    (found,) = (each for each in report.steps if each.name == step)
    return sum(each.in_layers[layer] for each in found.operations if kernel in each.kernel)


@pytest.mark.parametrize("deployment", RUNNING, ids=name_of)
def test_it_is_built_and_steps(deployment: Deployment, report_of: Reports) -> None:
    report = report_of(deployment)
    assert (report.refused, report.does_not_fit, report.failed) == ("", "", "")
    assert [step.name for step in report.steps] == ["prefill", "decode"]
    assert report.choices["model runner"] == ("V2" if deployment.v2_model_runner else "V1")
    assert {tensors.device for tensors in report.tensors} == {f"cuda:{deployment.rank}"}
    assert report.memory is not None
    assert report.memory.cache_tokens > 16384


ATTENTION = {
    FOUR_LAYERS: "FLASH_ATTN_MLA (FlashAttnMLAImpl)",
    FP8: "FLASH_ATTN_MLA (FlashAttnMLAImpl)",
    FP8_CACHE: "FLASHMLA (FlashMLAImpl)",
    BLACKWELL: "FLASHINFER_MLA (FlashInferMLAImpl)",
    OURS_MLA: "LONGCAT_FLASHINFER_MLA (FlashInferPagedMLAImpl)",
    OURS_MLA_FP8: "LONGCAT_FLASHINFER_MLA (FlashInferPagedMLAImpl)",
}


@pytest.mark.parametrize(("deployment", "wanted"), ATTENTION.items(), ids=lambda value: str(value)[:60])
def test_attention_is_vllms_own_choice_or_what_was_requested(
    deployment: Deployment, wanted: str, report_of: Reports
) -> None:
    assert report_of(deployment).choices["attention"] == wanted


EXPERTS = {
    FOUR_LAYERS: "TritonExpertsOfFewTokens",
    FP8: "FlashInferExperts",
    DATA_PARALLEL: "FlashInferExperts",
    LITE: "TritonExpertsOfFewTokens",
    OURS: "LongcatExperts",
    BLACKWELL: "FlashInferExperts",
    BLACKWELL_FP8: "TritonExpertsOfFewTokens",
}


@pytest.mark.parametrize(("deployment", "wanted"), EXPERTS.items(), ids=lambda value: str(value)[:60])
def test_experts_skip_zero_experts_and_have_a_map_of_ffn_experts(
    deployment: Deployment, wanted: str, report_of: Reports
) -> None:
    choices, experts = report_of(deployment).choices, MODELS[deployment.model]["n_routed_experts"]
    assert choices["experts"] == wanted
    assert choices["expert map"] == f"({experts},) torch.int32"


@pytest.mark.deployments(BF16)
def test_a_rank_holds_its_share_of_the_published_tensors(report_of: Reports) -> None:
    """Also where they leave no room for anything else."""
    ranks = 8
    config = spellings.read(MODELS["chat"])
    whole = ("q_a_", "kv_a_", "layernorm", "model.norm", "router")
    wanted = sum(
        prod(shape) * (4 if ".router." in name else 2) / (1 if any(part in name for part in whole) else ranks)
        for name, shape in names.expected_tensors(config, with_mtp=False).items()
    )
    derived = ("W_UK_T", "W_UV", "inverse_frequencies", "expert_map")
    tensors = report_of(BF16).tensors
    held = sum(each.bytes for each in tensors if not each.name.endswith(derived))
    assert held == pytest.approx(wanted, rel=1e-6)
    assert round(held / 1e9, 1) == 141.9


@pytest.mark.parametrize(
    ("deployment", "wanted"), [(FP8, 64512), (FOUR_LAYERS, 9216), (FP8_CACHE, 4608), (LITE, 32256)], ids=str
)
def test_the_cache_takes_a_latent_for_each_attention(deployment: Deployment, wanted: int, report_of: Reports) -> None:
    memory = report_of(deployment).memory
    assert memory is not None
    assert memory.cache_a_token == wanted


@pytest.mark.deployments(BF16)
def test_bf16_leaves_no_room_for_a_cache_on_eight_h200(report_of: Reports) -> None:
    report = report_of(BF16)
    assert "No available memory for the cache blocks" in report.does_not_fit
    assert report.memory is not None
    assert report.memory.weights > report.memory.requested


@pytest.mark.parametrize("deployment", [FP8, FOUR_LAYERS, OURS], ids=name_of)
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_a_layer_has_as_few_sums_over_ranks_as_it_can(deployment: Deployment, step: str, report_of: Reports) -> None:
    report = report_of(deployment)
    (found,) = (each for each in report.steps if each.name == step)
    layers = range(MODELS[deployment.model]["num_layers"])
    assert {found.in_layer(layer)["collective"] for layer in layers} == {ALL_REDUCES_A_LAYER}


@pytest.mark.parametrize(("deployment", "kinds"), BESIDE.items(), ids=str)
def test_the_experts_alone_are_on_the_second_stream(
    deployment: Deployment, kinds: tuple[str, ...], report_of: Reports
) -> None:
    """Sums over tensor-parallel ranks never are; between data-parallel ranks, it is the experts' own."""
    is_summed = "collective" not in kinds
    for step in report_of(deployment).steps:
        for layer in range(MODELS[deployment.model]["num_layers"]):
            beside, all_of_it = step.beside(layer), step.in_layer(layer)
            assert set(kinds) <= beside.keys()
            assert not {"attention", "cache", "norm", "rotary"} & beside.keys()
            assert beside["experts"] == all_of_it["experts"]
            assert all_of_it["collective"] - beside.get("collective", 0) == (ALL_REDUCES_A_LAYER if is_summed else 0)
        assert not any(step.unordered)


@pytest.mark.parametrize("deployment", [FOUR_LAYERS, FP8, DATA_PARALLEL], ids=name_of)
def test_there_is_no_second_stream_unasked(deployment: Deployment, report_of: Reports) -> None:
    for step in report_of(deployment).steps:
        assert [step.beside(layer) for layer in range(MODELS[deployment.model]["num_layers"])] == (
            [{}] * MODELS[deployment.model]["num_layers"]
        )


@pytest.mark.parametrize("deployment", [FOUR_LAYERS, FP8], ids=name_of)
def test_a_layer_launches_two_attentions_with_their_caches_and_eight_norms(
    deployment: Deployment, report_of: Reports
) -> None:
    report = report_of(deployment)
    assert launches(report, "prefill", 1, "FlashAttnFwdSm90") == 2
    assert launches(report, "decode", 1, "FlashAttnFwdSm90") == 2
    assert launches(report, "decode", 1, "concat_and_cache_mla_kernel") == 2
    assert launches(report, "decode", 1, "rms_norm_kernel") == 8
    assert launches(report, "decode", 1, "act_and_mul_kernel") == 2 + (deployment is FOUR_LAYERS)


@pytest.mark.deployments(BLACKWELL)
def test_the_router_of_a_blackwell_is_vllms_product_of_three_in_bf16(report_of: Reports) -> None:
    assert launches(report_of(BLACKWELL), "decode", 1, "cutlass Sm100BF16x3RouterGemm") == 1


@pytest.mark.deployments(FOUR_LAYERS, FP8, OURS)
def test_the_experts_of_a_layer_are_two_products_or_one_call(report_of: Reports) -> None:
    assert launches(report_of(FOUR_LAYERS), "decode", 1, "triton fused_moe_kernel") == 2
    assert launches(report_of(FP8), "decode", 1, "run_moe") == 1
    assert launches(report_of(OURS), "decode", 1, "triton gate_up_kernel") == 1
    assert launches(report_of(OURS), "decode", 1, "triton down_kernel") == 1


@pytest.mark.deployments(MOVING)
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_each_layer_places_and_counts_rows_where_experts_move(step: str, report_of: Reports) -> None:
    """By vLLM's router, which does so only with the state of its balancing."""
    report, layers = report_of(MOVING), range(MODELS[MOVING.model]["num_layers"])
    assert [launches(report, step, layer, "_eplb_map_and_record") for layer in layers] == [1] * len(layers)
    assert report.choices["expert map"] == "(544,) torch.int32", "512 FFN experts and 32 redundant ones"


OVERLAP_TRACED = Deployment("8xH200", "chat-fp8-4-layers", f"{EP8} {OVERLAP}", is_traced=True)


@pytest.mark.deployments(OVERLAP_TRACED)
def test_torch_compile_sees_a_fork_and_a_join_in_a_layer(report_of: Reports) -> None:
    report = report_of(OVERLAP_TRACED)
    assert (report.refused, report.failed) == ("", "")
    operators = report.graphs[0].operators
    assert (operators["branch_begin"], operators["branch_end"]) == (2, 2)
    assert "moe_forward" not in operators


TRACED = Deployment("8xH200", "chat-fp8-4-layers", f"{EP8} {drafts(3)}", is_traced=True)


@pytest.mark.deployments(TRACED)
def test_torch_compile_traces_the_model_as_a_whole(report_of: Reports) -> None:
    """Of two layers. vLLM traces with `fullgraph`, and splits at each attention."""
    report = report_of(TRACED)
    assert (report.refused, report.failed) == ("", "")
    backbone = report.graphs[0]
    assert (backbone.model, backbone.pieces) == ("backbone", 5)
    assert backbone.operators["all_reduce"] == 1 + 2 * ALL_REDUCES_A_LAYER
    assert backbone.operators["unified_mla_attention_with_output"] == 4
    assert backbone.operators["moe_forward"] == 2


@pytest.mark.deployments(TRACED)
def test_torch_compile_traces_the_drafter_as_a_whole(report_of: Reports) -> None:
    drafter = report_of(TRACED).graphs[1]
    assert (drafter.model, drafter.pieces) == ("eagle_head", 2)


@pytest.mark.parametrize("deployment", MTP, ids=name_of)
def test_a_step_with_drafts_verifies_all_of_them(deployment: Deployment, report_of: Reports) -> None:
    number = int(deployment.options.rpartition(":")[2].rstrip("}"))
    decode = report_of(deployment).steps[1]
    assert decode.tokens == decode.requests * (1 + number)
    assert any(tensors.name.startswith("drafter.") for tensors in report_of(deployment).tensors)


REFUSED = {
    Deployment("8xH200", "chat-fp8-4-layers", f"{DP8} --all2all-backend deepep_low_latency"): (
        "wanted allgather_reducescatter or deepep_high_throughput, as it has room for 11 experts a token"
    ),
    Deployment("8xH200", "chat-4-layers", "--tensor-parallel-size 16"): "ranks: 16, wanted at most 8",
    Deployment("8xH200", "chat-4-layers", "--no-such-option"): "--no-such-option",
    Deployment(
        "8xH200", "chat-fp8-4-layers", f"{DP8} --all2all-backend deepep_high_throughput --enable-dbo {OVERLAP}"
    ): "leave --enable-dbo and --ubatch-size out",
    Deployment(
        "8xH200",
        "chat-fp8-4-layers",
        f"--data-parallel-size 2 --tensor-parallel-size 4 --enable-expert-parallel {OVERLAP}",
    ): "which would sum over tensor-parallel ranks in another stream at the same time",
    Deployment("8xB200", "chat-4-layers", f'{EP8} --additional-config {{"longcat":{{"flashinfer_mla":true}}}}'): (
        "compute capability 10.0"
    ),
}


@pytest.mark.parametrize(("deployment", "wanted"), REFUSED.items(), ids=lambda value: str(value)[:60])
def test_what_cannot_be_served_is_refused_before_a_worker_starts(
    deployment: Deployment, wanted: str, report_of: Reports
) -> None:
    report = report_of(deployment)
    assert wanted in report.refused
    assert (report.tensors, report.failed) == ((), "")


OWN_CLASS = Deployment("8xH200", "chat-4-layers", f"{EP8} --moe-backend marlin")


@pytest.mark.deployments(OWN_CLASS)
def test_what_is_not_known_to_skip_zero_experts_is_left_to_vllms_own_class(report_of: Reports) -> None:
    assert report_of(OWN_CLASS).choices["architecture"] == "VllmLongcatFlashForCausalLM"


NEEDS_DEEPEP = Deployment("8xH200", "chat-fp8-4-layers", f"{DP8} --all2all-backend deepep_high_throughput")


@pytest.mark.deployments(NEEDS_DEEPEP)
def test_deepep_is_asked_for_where_it_is_chosen(report_of: Reports) -> None:
    """It is no package of an index; how it takes choices of -1 was read, not run."""
    report = report_of(NEEDS_DEEPEP)
    assert report.refused == ""
    assert "DeepEP kernels not found" in report.failed


@pytest.mark.parametrize("deployment", [OURS_MLA, OURS_MLA_FP8], ids=name_of)
def test_flashinfers_mla_is_called_once_for_each_attention_of_a_decode_step(
    deployment: Deployment, report_of: Reports
) -> None:
    assert launches(report_of(deployment), "decode", 1, "flashinfer batch_mla") == 2
