"""An FP8 checkpoint is the source rounded, says so in its `config.json`, and is the same where it was interrupted."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longcat_core import spellings
from longcat_core.drafting import gate as drafting
from longcat_core.recipe.conversion import PROGRESS, Bytes, Conversion, Source
from longcat_core.recipe.layers import linear_layers
from longcat_core.weights import checkpoint
from longcat_core.weights.audit import CheckpointError
from longcat_core.weights.blocks import FP8, dequantize_blocks, quantize_blocks
from longcat_core.weights.names import all_tensors
from longcat_core.weights.streaming import PublishedTensors
from tests.cases import CASES, DEFAULT, Case, in_dtype, published, write_checkpoint

QKV_A, EXPERTS = "model.layers.0.self_attn.1.fused_qkv_a_proj", "model.layers.1.mlp.experts"
DOWN = "model.layers.0.mlps.1.down_proj"
KEPT = {QKV_A, EXPERTS, DOWN}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """In bf16, with files beside its weights."""
    raw = spellings.published(DEFAULT) | {"torch_dtype": "bfloat16", "auto_map": {"AutoConfig": "龙猫"}}
    directory = write_checkpoint(tmp_path / "source", DEFAULT, in_dtype(published(DEFAULT), torch.bfloat16), raw)
    drafting.save(drafting.DraftGate(0.25), directory, drafting.fingerprint(directory, DEFAULT))
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", ".hidden", "pytorch_model.bin"):
        (directory / name).write_text(f"{{}}{name}")
    return directory


def convert(source: Path, out: Path, kept: set[str] = KEPT, mtp_in_fp8: bool = True) -> Path:
    out.mkdir(exist_ok=True)
    Conversion(Source(source), kept, mtp_in_fp8).write(out)
    return out


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def raw_config(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return found


def rounded(weight: Tensor) -> Tensor:
    return dequantize_blocks(*quantize_blocks(weight))


def test_weights_in_fp8_are_the_sources_rounded_and_all_others_are_the_sources(source: Path, tmp_path: Path) -> None:
    out = convert(source, tmp_path / "out")
    config = checkpoint.read_config(out)
    assert config.quantization is not None
    before, after = checkpoint.load(source, DEFAULT), checkpoint.load(out, config)
    in_fp8 = {layer.weight for layer in linear_layers(DEFAULT, before) if layer.group not in KEPT}
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert config.quantization.is_fp8(name) is (name in in_fp8), name
        assert torch.equal(after[name], rounded(tensor) if name in in_fp8 else tensor), name
        assert name in in_fp8 or after[name].dtype is tensor.dtype, name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_any_longcat_flash_is_converted(case: Case, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", case.config, case.published())
    out = convert(tmp_path / "source", tmp_path / "out", set())
    checkpoint.verify(out, checkpoint.read_config(out), requires_mtp=True)


def test_config_json_is_the_sources_with_what_is_in_fp8(source: Path, tmp_path: Path) -> None:
    found = raw_config(convert(source, tmp_path / "out"))
    quantization = found.pop("quantization_config")
    assert found == raw_config(source)
    ignored = quantization.pop("ignored_layers")
    assert quantization == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    experts = [f"{EXPERTS}.{e}.{part}_proj" for e in range(DEFAULT.n_routed_experts) for part in ("gate", "up", "down")]
    attention = "model.layers.0.self_attn.1"
    assert ignored == [f"{attention}.q_a_proj", f"{attention}.kv_a_proj_with_mqa", DOWN, *experts], "both of a pair"


@pytest.mark.parametrize("before", [None, ["mtp"], ["self_attn", "mtp"]])
@pytest.mark.parametrize("mtp_in_fp8", [True, False])
def test_the_draft_layer_is_in_fp8_or_not_as_a_whole(
    mtp_in_fp8: bool, before: list[str] | None, source: Path, tmp_path: Path
) -> None:
    raw = raw_config(source) | ({} if before is None else {"disable_quant_module": before})
    (source / "config.json").write_text(json.dumps(raw))
    out = convert(source, tmp_path / "out", set(), mtp_in_fp8)
    found = raw_config(out)
    layers = [layer.name for layer in linear_layers(DEFAULT, all_tensors(DEFAULT)) if layer.group == "model.mtp"]
    assert found.get("disable_quant_module") == (None if mtp_in_fp8 else ["mtp"]), "what the source had is no more true"
    assert found["quantization_config"]["ignored_layers"] == ([] if mtp_in_fp8 else layers)
    tensors = PublishedTensors(out, DEFAULT)
    wanted = FP8 if mtp_in_fp8 else torch.bfloat16
    assert {tensors.dtype(f"{name}.weight") for name in layers} == {wanted}


def test_a_source_in_fp32_is_bf16_outside_fp8_but_for_its_router(source: Path, tmp_path: Path) -> None:
    raw = raw_config(source) | {"torch_dtype": "float32"}
    write_checkpoint(tmp_path / "fp32", DEFAULT, published(DEFAULT), raw)
    out = convert(tmp_path / "fp32", tmp_path / "out")
    assert raw_config(out)["torch_dtype"] == "bfloat16", "both engines refuse FP8 beside fp32"
    tensors = PublishedTensors(out, DEFAULT)
    for name in tensors.shapes:
        if tensors.dtype(name) is not FP8:
            assert tensors.dtype(name) is (torch.float32 if ".router." in name else torch.bfloat16), name
    exact = published(DEFAULT)["model.layers.0.mlps.0.up_proj.weight"]
    loaded = checkpoint.load(out, checkpoint.read_config(out))["model.layers.0.mlps.0.up_proj.weight"]
    assert torch.equal(loaded, rounded(exact)), "rounded once, not by way of bf16"


def test_files_beside_the_weights_are_copied_and_the_gate_stays_the_models(source: Path, tmp_path: Path) -> None:
    out = convert(source, tmp_path / "out")
    before, after = contents(source), contents(out)
    copied = {"tokenizer.json", "generation_config.json", "chat_template.jinja", "draft_gate/gate.safetensors"}
    assert {name: after[name] for name in copied} == {name: before[name] for name in copied}
    shards = {path.name for path in checkpoint.shards(out)}
    assert len(shards) >= 3
    assert after.keys() == copied | shards | {"config.json", checkpoint.INDEX_NAME}
    assert {path.stat().st_mode & 0o777 for path in out.glob("*.safetensors")} == {0o644}
    assert drafting.load(out) is not None


def test_sizes_are_those_of_the_files(source: Path, tmp_path: Path) -> None:
    conversion = Conversion(Source(source), KEPT, mtp_in_fp8=True)
    total = sum(conversion.bytes_by_kind().values(), Bytes())
    out = convert(source, tmp_path / "out")
    for directory, size in ((source, total.before), (out, total.after)):
        files = checkpoint.shards(directory)
        headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
        assert sum(path.stat().st_size for path in files) == size + headers
    index = json.loads((out / checkpoint.INDEX_NAME).read_text())
    assert index["metadata"] == {"total_size": total.after}
    extra = sum(Source(source).extra_bytes(layer) for layer in Source(source).layers if layer.group in KEPT)
    all_fp8 = sum(Conversion(Source(source), (), mtp_in_fp8=True).bytes_by_kind().values(), Bytes())
    assert total.after - all_fp8.after == extra


class StopError(Exception):
    pass


def test_an_interrupted_run_goes_on_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    whole = contents(convert(source, tmp_path / "whole"))
    out = tmp_path / "out"
    out.mkdir()
    (out / PROGRESS).write_text("{}")
    conversion = Conversion(Source(source), KEPT, mtp_in_fp8=True)
    total = conversion.unwritten_bytes(out)

    def stop_after_a_half(report_of: list[int], size: int) -> None:
        report_of.append(size)
        if sum(report_of) > total / 2:
            raise StopError

    written: list[int] = []
    with pytest.raises(StopError):
        conversion.write(out, lambda size: stop_after_a_half(written, size))
    assert not (out / "config.json").exists(), "no engine takes it for a checkpoint"
    done = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert 0 < len(done) < len(checkpoint.shards(tmp_path / "whole"))
    assert 0 < conversion.unwritten_bytes(out) < total
    for path in done:
        os.utime(path, ns=(1, 1))
    reported: list[int] = []
    conversion.write(out, reported.append)
    assert sum(reported) == total
    assert contents(out) == whole, "and nothing else is left there"
    assert {path.stat().st_mtime_ns for path in done} == {1}, "what was written is not written again"


def test_what_engines_own_classes_read_wrongly_is_said(source: Path, tmp_path: Path) -> None:
    def cautions(directory: Path, *kept: str, mtp_in_fp8: bool = True) -> list[str]:
        return Conversion(Source(directory), kept, mtp_in_fp8).cautions()

    (uneven,) = cautions(source)
    assert uneven.startswith("gate_proj of 32 rows, gate_proj of 96 rows, q_a_proj of 48 rows, no whole blocks of 128")
    even = replace(DEFAULT, num_layers=1, q_lora_rank=128, ffn_hidden_size=256, expert_ffn_hidden_size=128)
    write_checkpoint(tmp_path / "even", even, in_dtype(published(even), torch.bfloat16))
    assert cautions(tmp_path / "even") == []
    (pair,) = cautions(tmp_path / "even", QKV_A)
    assert pair.startswith("1 pairs of q_a_proj and kv_a_proj_with_mqa are in bf16")
    (draft,) = cautions(tmp_path / "even", mtp_in_fp8=False)
    assert draft.startswith("the draft layer is in bf16")


# -- refusals --------------------------------------------------------------------------------------------


def test_a_source_in_fp8_is_refused(source: Path, tmp_path: Path) -> None:
    out = convert(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"quantised already \(fp8, .* give the checkpoint in bf16 or fp32"):
        Source(out)


def test_a_source_in_another_precision_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, DEFAULT, in_dtype(published(DEFAULT), torch.float16))
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight is F16, wanted BF16 or F32"):
        Source(tmp_path)


def test_weights_that_are_not_finite_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    tensors = in_dtype(published(DEFAULT), torch.bfloat16)
    tensors[f"{EXPERTS}.3.up_proj.weight"][0, 0] = torch.inf
    write_checkpoint(tmp_path / "broken", DEFAULT, tensors)
    with pytest.raises(CheckpointError, match=r"experts.3.up_proj.weight: has numbers that are not finite"):
        convert(tmp_path / "broken", tmp_path / "out", set())
