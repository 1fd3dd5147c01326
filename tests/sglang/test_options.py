"""Each of SGLang's options that was looked at has the outcome that its row says."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt import layers
from sglang.srt.arg_groups.arg_utils import record_fields
from sglang.srt.configs.update_config import get_moe_padding_size
from sglang.srt.server_args import ServerArgs

from longcat_core.plugin.options import Outcome
from longcat_core.quantization import Quantization
from longcat_sglang import deployment, loading, options
from longcat_sglang.options import CHECKED_BY_VALUE, OPTIONS, OWN, WRONG
from tests.cases import CASES, Case
from tests.sglang.engine import configure

MTP = {"speculative_algorithm": "NEXTN"}
ASKED: dict[str, dict[str, Any]] = {
    "--tokenizer-worker-num": {"tokenizer_worker_num": 2, "tool_call_parser": "longcat"},
    "--ep-dispatch-algorithm lp": {"ep_dispatch_algorithm": "lp"},
    "--init-expert-location FILE": {"init_expert_location": "counts.pt"},
    "--eplb-algorithm deepseek_hierarchical": {
        "eplb_algorithm": "deepseek_hierarchical",
        "init_expert_location": "counts.pt",
    },
    "--elastic-ep-backend": {"elastic_ep_backend": "mooncake"},
    "--enable-elastic-expert-backup": {"enable_elastic_expert_backup": True},
    "--moe-a2a-backend deepep": {"moe_a2a_backend": "deepep"},
    "--moe-a2a-backend deepep --moe-runner-backend triton": {
        "moe_a2a_backend": "deepep",
        "moe_runner_backend": "triton",
        "deepep_mode": "normal",
    },
    "--moe-a2a-backend mooncake": {"moe_a2a_backend": "mooncake"},
    "--enable-two-batch-overlap": {"enable_two_batch_overlap": True},
    "--moe-dense-tp-size": {"moe_dense_tp_size": 1},
    "--dwdp-size": {"dwdp_size": 2},
    "--enable-waterfill": {"enable_waterfill": True},
    "--dcp-size": {"dcp_size": 2},
    "--attn-cp-size": {"attn_cp_size": 2},
    "--enable-lora": {"lora_paths": ["adapter"]},
    "--enable-return-routed-experts": {"enable_return_routed_experts": True},
    "--expert-distribution-recorder-mode per_token": {"expert_distribution_recorder_mode": "per_token"},
    "--cpu-offload-gb": {"cpu_offload_gb": 1},
    "--offload-group-size": {"offload_group_size": 2},
    "--is-embedding": {"is_embedding": True},
    "--load-format layered": {"load_format": "layered"},
    "--load-format sharded_state": {"load_format": "sharded_state", **MTP},
    "--attention-backend": {"attention_backend": "triton"},
    "--prefill-attention-backend": {"prefill_attention_backend": "triton"},
    "--decode-attention-backend": {"decode_attention_backend": "triton"},
    "--kv-cache-dtype": {"kv_cache_dtype": "fp8_e4m3"},
    "--page-size": {"page_size": 8},
    "--enable-torch-compile": {"enable_torch_compile": True},
    "--pp-size": {"pp_size": 2},
    "--tp-size": {"tp_size": 3},
    "--ep-size": {"ep_size": 7},
    "--speculative-algorithm": {"speculative_algorithm": "EAGLE3"},
    "--speculative-draft-model-path": {"speculative_draft_model_path": "/another", **MTP},
    "--speculative-num-steps": {"speculative_num_steps": 0, **MTP},
    "--speculative-num-draft-tokens": {"speculative_num_steps": 2, "speculative_eagle_topk": 2, **MTP},
    "--speculative-token-map": {"speculative_token_map": "/tokens.pt", **MTP},
    "--speculative-draft-model-quantization": {"speculative_draft_model_quantization": "fp8", **MTP},
    "--enable-multi-layer-eagle": {"enable_multi_layer_eagle": True, **MTP},
    "--speculative-draft-attention-backend": {"speculative_draft_attention_backend": "triton", **MTP},
    "--quantization": {"quantization": "fp8"},
    "--moe-runner-backend": {"moe_runner_backend": "flashinfer_cutlass"},
    "--moe-a2a-backend": {"moe_a2a_backend": "flashinfer"},
    "--enable-fused-moe-sum-all-reduce": {"enable_fused_moe_sum_all_reduce": True},
    "--kt-weight-path": {"kt_weight_path": "/experts"},
    "--model-impl transformers": {"model_impl": "transformers"},
}
"""What asks for each option that is refused or left to SGLang's own class."""
LEFT = [*(rule.option.flag for rule in OWN), "--quantization"]
REFUSED = [option.flag for option in (*(rule.option for rule in WRONG), *CHECKED_BY_VALUE) if option.flag not in LEFT]
REFUSED += ["--init-expert-location FILE"]
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "--tokenizer-worker-num": ("cpu", {"tokenizer_worker_num": 2}),
    "--enable-return-routed-experts": ("cuda", {"enable_return_routed_experts": True}),
    "--load-format sharded_state": ("cpu", {"load_format": "sharded_state"}),
    "--kv-cache-dtype": ("cuda", {"kv_cache_dtype": "fp8_e4m3"}),
    "--tp-size": ("cpu", {"tp_size": 2}),
    "--ep-size": ("cpu", {"ep_size": 2, "tp_size": 2}),
    "--init-expert-location FILE": ("cpu", {"init_expert_location": "trivial"}),
    "--speculative-draft-model-path": ("cpu", {"speculative_draft_model_path": "nowhere", **MTP}),
    "--speculative-num-steps": ("cpu", {"speculative_num_steps": 3, **MTP}),
    "--speculative-num-draft-tokens": (
        "cpu",
        {"speculative_num_draft_tokens": 4, "speculative_num_steps": 2, "speculative_eagle_topk": 2, **MTP},
    ),
    "--speculative-draft-model-quantization": (
        "cpu",
        {"speculative_draft_model_quantization": "fp8", "quantization": "fp8", **MTP},
    ),
    "--speculative-algorithm": ("cpu", MTP),
    "--quantization": ("cpu", {"quantization": "fp8"}),
    "--moe-runner-backend": ("cuda", {"moe_runner_backend": "deep_gemm"}),
    "--moe-a2a-backend": ("cuda", {"moe_a2a_backend": "deepep", "deepep_mode": "normal"}),
}
"""Of each row with exceptions, what is served, on which device; with --quantization, of a release in FP8."""
LONGCAT = replace(CASES["default"].config, moe_topk=12)
MODEL_CONFIG: Any = SimpleNamespace(hf_config=SimpleNamespace(longcat=LONGCAT), quantization=None, dtype=torch.bfloat16)


def settings(device: str, **asked: Any) -> Any:
    """SGLang's options as they are when nothing is given, and `asked`."""
    given = ServerArgs(model_path="nowhere")
    defaults = {field.name: getattr(given, field.name) for field in record_fields(ServerArgs)}
    return SimpleNamespace(**{**defaults, "device": device, **asked})


def refused(device: str, **asked: Any) -> list[str]:
    given = settings(device, **asked)
    return deployment._unsupported(given, given, MODEL_CONFIG)


def test_what_is_asked_for_is_each_row_that_is_refused_or_left() -> None:
    assert sorted(ASKED) == sorted([*REFUSED, *LEFT])
    outcomes = (Outcome.REFUSED, Outcome.WITH_EXCEPTIONS, Outcome.OWN_CLASS)
    rows = {option.flag for option in OPTIONS if option.outcome in outcomes}
    assert rows | {option.flag for option in CHECKED_BY_VALUE if option.outcome is Outcome.UNTRIED} == {*ASKED}
    assert len(OPTIONS) > 50


def test_each_row_with_exceptions_is_looked_at() -> None:
    assert {option.flag for option in OPTIONS if option.outcome is Outcome.WITH_EXCEPTIONS} == SERVED.keys()


@pytest.mark.parametrize("flag", SERVED)
def test_an_option_with_exceptions_is_served_without(flag: str) -> None:
    device, asked = SERVED[flag]
    given, model = settings(device, **asked), in_fp8() if "quantization" in asked else MODEL_CONFIG
    assert deployment._unsupported(given, given, model) == []
    assert deployment.reasons_for_sglangs_own_class(given, model) == []


@pytest.mark.parametrize("flag", REFUSED)
def test_a_refusal_names_the_option_of_its_row(flag: str) -> None:
    assert refused("cpu") == []
    problems = refused("cpu", **ASKED[flag])
    assert any(flag.split()[0] in problem for problem in problems), problems


@pytest.mark.parametrize("algorithm", ["NEXTN", "EAGLE", "nextn", "Eagle"])
def test_drafts_from_a_saved_state_are_refused_however_they_are_spelled(algorithm: str) -> None:
    assert refused("cpu", load_format="sharded_state") == []
    (problem,) = refused("cpu", load_format="sharded_state", speculative_algorithm=algorithm)
    assert "leave --speculative-algorithm out" in problem


@pytest.mark.parametrize("rule", WRONG, ids=lambda rule: rule.option.flag)
def test_a_refusal_is_of_no_gpu_or_of_none_but_a_cpu(rule: options.Rule) -> None:
    problems = refused("cuda", **ASKED[rule.option.flag])
    assert bool(problems) is (rule.option.flag != "--enable-return-routed-experts"), "whose memory a GPU can pin"


@pytest.mark.parametrize("flag", LEFT)
def test_what_only_sglangs_own_class_can_serve_is_left_to_it_on_a_gpu(flag: str) -> None:
    assert deployment.reasons_for_sglangs_own_class(settings("cuda"), MODEL_CONFIG) == []
    (reason,) = deployment.reasons_for_sglangs_own_class(settings("cuda", **ASKED[flag]), MODEL_CONFIG)
    assert flag.strip("-") in reason
    assert deployment.reasons_for_sglangs_own_class(settings("cpu", **ASKED[flag]), MODEL_CONFIG) == []


@pytest.mark.parametrize("rule", OWN, ids=lambda rule: rule.option.flag)
def test_what_is_left_on_a_gpu_is_refused_on_a_cpu_where_it_does_something(rule: options.Rule) -> None:
    problems = refused("cpu", **ASKED[rule.option.flag])
    assert bool(problems) is (rule.option.flag != "--moe-runner-backend"), "which a CPU does not ask for"


def actions() -> list[argparse.Action]:
    """SGLang's options as its command line has them."""
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser._actions


def test_every_row_is_an_option_of_sglang() -> None:
    flags = {flag for action in actions() for flag in action.option_strings}
    assert {option.name for option in OPTIONS} <= flags


# -- transports of tokens to experts -----------------------------------------------------------------

SERVED_BEHIND = ("none", "deepep")
FAILS_IN_BF16 = ("mooncake", "nixl", "mori", "pplx")


def test_every_transport_is_served_refused_or_left_to_sglangs_own_class_before_any_worker_starts() -> None:
    """In bf16 neither class has a kernel for some. If this fails for a new one, read what it does with an id of -1."""
    (transports,) = (action.choices for action in actions() if "--moe-a2a-backend" in action.option_strings)
    assert transports is not None
    assert set(transports) >= {*SERVED_BEHIND, *FAILS_IN_BF16}
    for transport in transports:
        given = settings("cuda", moe_a2a_backend=transport, deepep_mode="normal")
        reasons, problems = deployment.reasons_for_sglangs_own_class(given, MODEL_CONFIG), refused(**vars(given))
        assert bool(problems) is (transport in FAILS_IN_BF16)
        assert bool(reasons) is (transport not in (*SERVED_BEHIND, *FAILS_IN_BF16))
        assert bool(deployment.reasons_for_sglangs_own_class(given, in_fp8())) is (transport not in SERVED_BEHIND)
        assert bool(refused(**vars(given) | {"device": "cpu"})) is (transport != "none")


def test_experts_behind_pplx_have_deepgemms_kernels_if_these_are_asked_for() -> None:
    given = settings("cuda", moe_a2a_backend="pplx", moe_runner_backend="deep_gemm")
    assert refused(**vars(given)) == []
    assert len(deployment.reasons_for_sglangs_own_class(given, MODEL_CONFIG)) == 1


@pytest.mark.parametrize(
    ("transport", "runner", "wanted"),
    [
        ("deepep", "auto", {"moe_runner_backend": "deep_gemm"}),
        ("deepep", "deep_gemm", {}),
        ("none", "auto", {}),
    ],
)
def test_behind_deepep_experts_get_deepgemms_kernels(
    transport: str, runner: str, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's choice for experts in bf16, Triton's, fails there."""
    from sglang.srt.arg_groups import overrides

    declared: dict[str, str] = {}
    given = settings("cuda", moe_a2a_backend=transport, moe_runner_backend=runner)
    monkeypatch.setattr(deployment.hooks, "install", lambda _: None)
    monkeypatch.setattr(deployment, "check", lambda *_: None)
    monkeypatch.setattr(overrides, "resolving_view", lambda _: given)
    monkeypatch.setattr(overrides, "model_config_of", lambda _: MODEL_CONFIG)
    monkeypatch.setattr(overrides, "declare_resolution", lambda _, __, **fields: declared.update(fields))
    deployment.settle(given)
    assert declared == wanted


@pytest.mark.parametrize(
    ("asked", "chosen", "is_slow"),
    [
        ({"kv_cache_dtype": "fp8_e4m3"}, "fa3", True),
        ({"kv_cache_dtype": "fp8_e4m3"}, "triton", False),
        ({"kv_cache_dtype": "fp8_e5m2"}, "fa3", False),
        ({"kv_cache_dtype": "fp8_e5m2"}, "flashinfer", True),
        ({"kv_cache_dtype": "fp8_e4m3", "attention_backend": "trtllm_mla"}, "fa3", False),
        ({"kv_cache_dtype": "fp8_e4m3", "decode_attention_backend": "flashmla"}, "fa3", False),
        (
            {"kv_cache_dtype": "fp8_e4m3", "attention_backend": "fa3", "decode_attention_backend": "flashinfer"},
            "",
            True,
        ),
        ({}, "fa3", False),
    ],
    ids=str,
)
def test_a_cache_in_fp8_that_is_cast_as_a_whole_in_each_step_has_a_warning(
    asked: dict[str, str], chosen: str, is_slow: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt.arg_groups import model_override_base, overrides

    given = settings("cuda", **asked)
    monkeypatch.setattr(deployment.hooks, "install", lambda _: None)
    monkeypatch.setattr(deployment, "check", lambda *_: None)
    monkeypatch.setattr(overrides, "resolving_view", lambda _: given)
    monkeypatch.setattr(overrides, "model_config_of", lambda _: MODEL_CONFIG)
    monkeypatch.setattr(model_override_base, "get_default_attn_backend", lambda *_, **__: chosen)
    with caplog.at_level("WARNING"):
        deployment.settle(given)
    assert ("give --decode-attention-backend flashmla or triton" in caplog.text) is is_slow


def test_sglang_still_casts_the_whole_cache_in_fp8_for_an_attention_of_fa3_and_flashinfer() -> None:
    """If this fails, `CASTS_AN_FP8_CACHE` may have become wrong. The files are read, as only a GPU imports them."""
    folder, cast = Path(layers.__path__[0]) / "attention", "get_key_buffer(layer.layer_id).to(q.dtype)"
    for name, is_cast in (("flashattention", True), ("flashinfer_mla", True), ("flashmla", False)):
        _, _, decode = (folder / f"{name}_backend.py").read_text().partition("    def forward_decode(")
        decode = decode.partition("\n    def ")[0]
        assert "get_key_buffer(layer.layer_id)" in decode
        assert (cast in decode) is is_cast


def test_a_quantisation_that_sglang_finds_in_another_file_is_found() -> None:
    """As ModelOpt's, in `hf_quant_config.json`."""
    quantised = SimpleNamespace(hf_config=MODEL_CONFIG.hf_config, quantization="modelopt_fp4")
    (reason,) = deployment.reasons_for_sglangs_own_class(settings("cuda"), quantised)
    assert reason.startswith("quantization: 'modelopt_fp4', wanted none, or ")
    (problem,) = deployment._unsupported(settings("cpu"), settings("cpu"), quantised)
    assert problem.startswith("quantization: 'modelopt_fp4', wanted none, or ")


FP8 = Quantization("fp8")


def in_fp8(quantization: Quantization = FP8, dtype: torch.dtype = torch.bfloat16) -> Any:
    longcat = replace(LONGCAT, quantization=quantization)
    return SimpleNamespace(hf_config=SimpleNamespace(longcat=longcat), quantization="fp8", dtype=dtype)


@pytest.mark.parametrize("asked", [{}, {"quantization": "fp8"}, {"quantization": "fp8", **MTP}], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_release_in_fp8_is_ours(device: str, asked: dict[str, Any]) -> None:
    """SGLang makes the drafter's quantisation what --quantization is."""
    given = settings(device, **asked, speculative_draft_model_quantization=asked.get("quantization"))
    assert deployment.reasons_for_sglangs_own_class(given, in_fp8()) == []
    assert deployment._unsupported(given, given, in_fp8()) == []


@pytest.mark.parametrize(
    ("release", "named"),
    [
        (Quantization("fp8", fmt="e5m2"), "fmt: 'e5m2'"),
        (Quantization("fp8", activation_scheme="static"), "activation_scheme: 'static'"),
        (Quantization("fp8", has_blocks=False), "weight_block_size: none"),
    ],
    ids=str,
)
def test_another_fp8_is_left_to_sglangs_own_class_on_a_gpu_and_refused_on_a_cpu(
    release: Quantization, named: str
) -> None:
    (reason,) = deployment.reasons_for_sglangs_own_class(settings("cuda"), in_fp8(release))
    assert reason.startswith(f"quantization_config.{named}, wanted")
    given = settings("cpu")
    (problem,) = deployment._unsupported(given, given, in_fp8(release))
    assert problem == f"{reason}; give such a checkpoint, or one in bf16, and leave --quantization out"


def test_blocks_of_another_size_are_served_where_all_weights_are_dequantised() -> None:
    release = in_fp8(Quantization("fp8", block=(64, 64)))
    (reason,) = deployment.reasons_for_sglangs_own_class(settings("cuda"), release)
    assert reason == "quantization_config.weight_block_size: [64, 64], wanted [128, 128]"
    assert deployment._unsupported(settings("cpu"), settings("cpu"), release) == []
    oblong = in_fp8(Quantization("fp8", block=(64, 32)))
    (problem,) = deployment._unsupported(settings("cpu"), settings("cpu"), oblong)
    assert problem.startswith("quantization_config.weight_block_size: [64, 32], wanted two equal numbers")


def test_sglang_takes_no_oblong_blocks_on_a_cpu() -> None:
    """If this fails, `deployment._unsupported` may let them through."""
    with pytest.raises(AssertionError):
        get_moe_padding_size([64, 32])


def test_fp8_weights_in_another_dtype_than_sglang_takes_are_refused() -> None:
    assert refused("cpu") == []
    (problem,) = deployment._unsupported(settings("cpu"), settings("cpu"), in_fp8(dtype=torch.float32))
    assert problem.startswith("dtype: float32, wanted bfloat16 or float16")
    assert deployment._unsupported(settings("cpu"), settings("cpu"), in_fp8(dtype=torch.float16)) == []


def test_only_a_drafter_in_another_precision_than_the_model_is_refused() -> None:
    given = settings("cpu", speculative_draft_model_quantization="modelopt_fp4", **MTP)
    (problem,) = deployment._unsupported(given, given, in_fp8())
    assert "leave --speculative-draft-model-quantization out" in problem


@pytest.mark.parametrize("device", ["npu", "xpu"])
def test_a_device_that_is_not_known_is_left_to_sglangs_own_class(device: str) -> None:
    (reason,) = deployment.reasons_for_sglangs_own_class(settings(device), MODEL_CONFIG)
    assert reason == f"longcat-serving does not know the device {device!r}"


def test_lora_is_refused_before_any_worker_starts(checkpoint_of: Callable[[Case], Path]) -> None:
    with pytest.raises(ValueError, match=r"a LongCat layer has two of each.*leave --enable-lora out"):
        configure(checkpoint_of(CASES["default"]), enable_lora=True, max_lora_rank=8, lora_target_modules=["all"])


# -- load formats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("load_format", ["sharded_state", "pt", "dummy", "remote_instance"])
def test_files_that_a_load_format_does_not_read_are_not_checked(
    load_format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model.safetensors").write_text("of another format")
    with caplog.at_level("INFO"):
        loading.check(tmp_path, settings("cpu", load_format=load_format), LONGCAT)
    assert f"not checked before it is loaded: --load-format {load_format} does not read" in caplog.text


def test_a_checkpoint_without_safetensors_is_not_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with caplog.at_level("INFO"):
        loading.check(tmp_path, settings("cpu"), LONGCAT)
    assert "pytorch_model.bin is not safetensors" in caplog.text


def test_a_snapshot_in_the_cache_of_the_hub_is_checked(
    checkpoint_of: Callable[[Case], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the Hub lays it out: symbolic links to blobs."""
    revision, repository = "0" * 40, tmp_path / "models--someone--longcat"
    snapshot = repository / "snapshots" / revision
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for number, file in enumerate(sorted(checkpoint_of(CASES["default"]).iterdir())):
        blob = repository / "blobs" / str(number)
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    cached = settings("cpu", model_path="someone/longcat", download_dir=str(tmp_path))
    directory = loading.local_directory(cached)
    assert directory == snapshot
    longcat = CASES["default"].config
    with caplog.at_level("INFO"):
        loading.check(directory, cached, longcat)
        assert caplog.text == ""
        with pytest.raises(ValueError, match="does not match its config"):
            loading.check(directory, cached, replace(longcat, num_layers=3))
        absent = settings("cpu", model_path="someone/else", download_dir=str(tmp_path))
        loading.check(loading.local_directory(absent), absent, longcat)
    assert "someone/else is not on this machine yet" in caplog.text


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ('{"longcat_kernels": true}', "they are for NVIDIA GPUs, and this is a CPU; or leave the kernels out"),
        ('{"longcat_kernels": false}', ""),
    ],
)
def test_our_kernels_are_refused_on_a_cpu(given: str, problem: str) -> None:
    problems = refused("cpu", json_model_override_args=given)
    assert len(problems) == bool(problem)
    assert all(found.endswith(problem) for found in problems)


@pytest.mark.parametrize("given", ['{"longcat_draft_gate": "yes"}', '{"longcat_gate": true}'])
def test_what_is_no_option_of_ours_is_named(given: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"longcat_.*wanted (true or false|longcat_draft_gate or .* or longcat_full_queue); correct --json-model",
    ):
        refused("cpu", json_model_override_args=given)
