"""SGLang's CUDA build on the null GPU: what deployments choose and hold, what a step launches, what is refused."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from functools import partial

import pytest

from tests.cuda.conftest import Reports
from tests.cuda.deployments import MODELS, Deployment

ALL_REDUCES_A_LAYER = 4
"""Two of attentions, one of the first dense FFN, one of the second and the experts together."""

SGLang = partial(Deployment, package="longcat_sglang")
EP8 = "--tp-size 8 --ep-size 8"
BF16 = SGLang("8xH200", "chat", EP8)
FP8 = SGLang("8xH200", "chat-fp8", EP8)
FEW_TOKENS = "--max-total-tokens 65536"
"""What four layers leave to the cache is so much that one attention's part, cast to bf16, would not fit."""
FP8_CACHE = SGLang("8xH200", "chat-4-layers", f"{EP8} --kv-cache-dtype fp8_e4m3 {FEW_TOKENS}")
FP8_CACHE_READ = SGLang("8xH200", "chat-4-layers", f"{FP8_CACHE.options} --decode-attention-backend flashmla")
FOUR_LAYERS = SGLang("8xH200", "chat-4-layers", EP8)
OVERLAP = "--tp-size 8 --enable-single-batch-overlap"
TENSOR_PARALLEL = SGLang("8xH200", "chat-4-layers", OVERLAP)
LITE = SGLang("8xH200", "lite-trunk", "")
DATA_PARALLEL = SGLang("8xH200", "chat-4-layers", "--tp-size 8 --dp-size 8 --enable-dp-attention")
BLACKWELL = SGLang("8xB200", "chat-4-layers", EP8)
RUNNING = [FP8, FP8_CACHE, FP8_CACHE_READ, FOUR_LAYERS, TENSOR_PARALLEL, LITE, DATA_PARALLEL, BLACKWELL]


def name_of(deployment: Deployment) -> str:
    return f"{deployment.machine} {deployment.model} {deployment.options}"


@pytest.mark.parametrize("deployment", RUNNING, ids=name_of)
def test_it_is_built_and_steps(deployment: Deployment, report_of: Reports) -> None:
    report = report_of(deployment)
    assert (report.refused, report.does_not_fit, report.failed) == ("", "", "")
    assert [step.name for step in report.steps] == ["prefill", "decode"]
    assert report.choices["architecture"] == "LongcatFlashForCausalLM"
    assert {tensors.device for tensors in report.tensors} == {"cuda:0"}


@pytest.mark.deployments(FOUR_LAYERS, BLACKWELL)
def test_attention_is_sglangs_own_choice(report_of: Reports) -> None:
    assert report_of(FOUR_LAYERS).choices["attention"] == "fa3"
    assert report_of(BLACKWELL).choices["attention"] == "trtllm_mla"


@pytest.mark.deployments(FOUR_LAYERS, TENSOR_PARALLEL)
def test_the_table_of_experts_has_an_entry_for_zero_experts(report_of: Reports) -> None:
    """-1 is its last entry."""
    assert report_of(FOUR_LAYERS).choices["expert map"] == f"({MODELS['chat']['n_routed_experts'] + 1},) torch.int32"
    assert report_of(TENSOR_PARALLEL).choices["expert map"] == "none"


@pytest.mark.parametrize(
    ("deployment", "wanted"), [(FP8, 64512), (FOUR_LAYERS, 9216), (FP8_CACHE, 4608), (LITE, 32256)], ids=str
)
def test_the_cache_takes_a_latent_for_each_attention(deployment: Deployment, wanted: int, report_of: Reports) -> None:
    memory = report_of(deployment).memory
    assert memory is not None
    assert memory.cache_a_token == wanted


@pytest.mark.deployments(BF16)
def test_bf16_leaves_no_room_for_a_cache_on_eight_h200(report_of: Reports) -> None:
    assert "leave no GPU memory for the KV cache" in report_of(BF16).does_not_fit


@pytest.mark.parametrize("deployment", [FP8, FOUR_LAYERS, TENSOR_PARALLEL], ids=name_of)
@pytest.mark.parametrize("step", [0, 1], ids=["prefill", "decode"])
def test_a_layer_has_as_few_sums_over_ranks_as_it_can(deployment: Deployment, step: int, report_of: Reports) -> None:
    """Its last one is made with the norm behind it: the next layer's first, and for the last layer the model's."""
    found, layers = report_of(deployment).steps[step], MODELS[deployment.model]["num_layers"]
    sums = [found.in_layer(layer)["collective"] for layer in range(layers)]
    assert sums == [ALL_REDUCES_A_LAYER - 1] + [ALL_REDUCES_A_LAYER] * (layers - 1)


@pytest.mark.deployments(FOUR_LAYERS)
def test_a_layer_launches_two_attentions_eight_norms_and_two_products_of_experts(report_of: Reports) -> None:
    decode = report_of(FOUR_LAYERS).steps[1]
    layer = {each.kernel: each.in_layers[1] for each in decode.operations}
    assert layer["flash::FlashAttnFwdSm90"] == 2
    assert layer["triton fused_moe_kernel"] == 2
    assert decode.in_layer(1)["norm"] == 8


@pytest.mark.deployments(FOUR_LAYERS)
@pytest.mark.parametrize("step", [0, 1], ids=["prefill", "decode"])
def test_no_angle_is_computed_beside_sglangs_table(step: int, report_of: Reports) -> None:
    """Its attentions rotate by that; our own functions of a CPU take angles."""
    kernels = {each.kernel.split()[-1] for each in report_of(FOUR_LAYERS).steps[step].operations}
    assert not kernels & {"cos", "sin"}


@pytest.mark.deployments(FOUR_LAYERS, FP8_CACHE, FP8_CACHE_READ)
def test_fa3_still_casts_the_whole_cache_in_fp8_for_every_attention(report_of: Reports) -> None:
    """One more copy for each of the two attentions, of which the log warns (`CASTS_AN_FP8_CACHE`)."""
    copies = "copies and arithmetic"
    own, cast = (report_of(each).steps[1].in_layer(1)[copies] for each in (FOUR_LAYERS, FP8_CACHE))
    assert cast >= own + 2
    warned = [
        any("casts the whole cache" in line for line in report_of(each).log)
        for each in (FOUR_LAYERS, FP8_CACHE, FP8_CACHE_READ)
    ]
    assert warned == [False, True, False]


@pytest.mark.deployments(TENSOR_PARALLEL)
def test_decoding_has_the_moe_alone_on_the_second_stream(report_of: Reports) -> None:
    """Beside the norms of latents, for which SGLang has another. Streams wait for each other within the layer, and sums
    over ranks stay on the first."""
    prefill, decode = report_of(TENSOR_PARALLEL).steps
    for layer in range(MODELS["chat-4-layers"]["num_layers"]):
        beside, all_of_it = decode.beside(layer), decode.in_layer(layer)
        assert {"experts", "routing", "activation"} <= beside.keys()
        assert not {"attention", "cache", "rotary", "collective"} & beside.keys()
        assert beside["experts"] == all_of_it["experts"]
        assert prefill.beside(layer) == {}
    assert not any(prefill.unordered + decode.unordered)


@pytest.mark.deployments(FOUR_LAYERS)
def test_without_overlap_decoding_has_the_norms_of_latents_alone_on_another_stream(report_of: Reports) -> None:
    prefill, decode = report_of(FOUR_LAYERS).steps
    layers = range(MODELS["chat-4-layers"]["num_layers"])
    assert [decode.beside(layer) for layer in layers] == [{"norm": 2}] * len(layers)
    assert [prefill.beside(layer) for layer in layers] == [{}] * len(layers)


HOOKS = ",".join(
    f'{{"name":"{fault}","target_modules":["model.norm"],"hook_factory":"tests.cuda.planted:{fault}"}}'
    for fault in ("join_left_out", "sum_in_the_branch")
)
PLANTED = SGLang("8xH200", "chat-4-layers", f"{OVERLAP} --forward-hooks [{HOOKS}]")


@pytest.mark.deployments(PLANTED)
def test_a_join_that_is_left_out_and_a_sum_on_the_second_stream_are_seen(report_of: Reports) -> None:
    prefill, decode = report_of(PLANTED).steps
    layers = range(MODELS["chat-4-layers"]["num_layers"])
    assert [decode.beside(layer)["collective"] for layer in layers] == [1] * len(layers)
    on_the_second = [sum(decode.beside(layer).values()) - decode.beside(layer)["norm"] for layer in layers]
    assert list(decode.unordered) == on_the_second
    assert not any(prefill.unordered)


REFUSED = {
    SGLang("8xH200", "chat-4-layers", f"{EP8} --moe-a2a-backend deepep"): "give --deepep-mode normal",
    SGLang("8xH200", "chat-4-layers", "--tp-size 4 --pp-size 2"): "pp_size: 2, wanted 1",
    SGLang("8xH200", "chat-4-layers", "--tp-size 16"): "ranks: 16, wanted at most 8",
}


@pytest.mark.parametrize(("deployment", "wanted"), REFUSED.items(), ids=lambda value: str(value)[-60:])
def test_what_cannot_be_served_is_refused_before_a_worker_starts(
    deployment: Deployment, wanted: str, report_of: Reports
) -> None:
    report = report_of(deployment)
    assert wanted in report.refused
    assert (report.tensors, report.failed) == ((), "")
