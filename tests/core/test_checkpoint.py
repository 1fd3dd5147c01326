"""Reading and writing published checkpoints: every problem is said, by name, and all of them at once."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.quantization import Quantization
from longcat_core.reference import LongcatForCausalLM
from longcat_core.weights import audit, checkpoint, names, plan
from longcat_core.weights.audit import Audit, CheckpointError
from longcat_core.weights.blocks import dequantize_blocks, quantize_blocks
from tests.cases import CASES, DEFAULT, in_dtype, published, write_checkpoint
from tests.oracle import relative_error

CONFIG = replace(DEFAULT, num_layers=1, hidden_size=200)
DOWN = "model.layers.0.mlp.experts.3.down_proj.weight"
GATE = "model.layers.0.mlps.1.gate_proj.weight"
MTP_NORM = "model.mtp.norm.weight"


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return published(CONFIG)


def problems(directory: Path, tensors: dict[str, Tensor], config: LongcatConfig = CONFIG) -> list[str]:
    write_checkpoint(directory, config, tensors)
    with pytest.raises(CheckpointError) as error:
        checkpoint.verify(directory, config)
    heading, *lines = str(error.value).splitlines()
    assert f"({len(lines)} problems)" in heading
    return [line.strip() for line in lines]


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_loaded(case: str, tmp_path: Path) -> None:
    config, tensors = CASES[case].config, CASES[case].published()
    loaded = checkpoint.load(write_checkpoint(tmp_path, config, tensors), config)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_shards_are_indexed_and_read_back(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint.save(tensors, tmp_path, max_shard_size=200_000)
    assert len(checkpoint.shards(tmp_path)) > 2
    loaded = checkpoint.load(tmp_path, CONFIG)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_saving_a_view_saves_only_the_view(tmp_path: Path) -> None:
    stacked = torch.randn(64, 64)
    checkpoint.save({"a": stacked[1], "b": stacked[:, 2:4].T, "c": stacked}, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * (64 * 64 + 64 + 2 * 64) + 1000


@pytest.mark.parametrize("case", CASES)
def test_every_published_tensor_has_a_place_of_its_own_and_none_is_left_empty(case: str) -> None:
    config = CASES[case].config
    model = LongcatForCausalLM(config)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    for name, shape in names.expected_tensors(config, with_mtp=True).items():
        place = plan.place(name, config)
        assert state[place.parameter][place.part].shape == shape, name
        state[place.parameter][place.part] += 1
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert all((value == 1).all() for value in state.values())


def test_zero_experts_have_no_tensors() -> None:
    published = names.expected_tensors(CONFIG, with_mtp=True)
    experts = {plan.expert_of(name) for name in published} - {None}
    assert experts == set(range(CONFIG.n_routed_experts))


def test_missing_extra_and_misshapen_tensors_are_all_listed(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    del tensors[DOWN]
    del tensors["model.norm.weight"]
    tensors[GATE] = tensors[GATE].T
    tensors["model.layers.0.mlp.router.classifier.weight"] = torch.zeros(CONFIG.n_routed_experts, CONFIG.hidden_size)
    tensors["model.layers.0.mlp.experts.12.up_proj.weight"] = torch.zeros(32, 200)
    tensors["model.rotary_emb.bias"] = torch.zeros(4)
    found = problems(tmp_path, tensors)
    assert len(found) == 6
    assert f"missing: {DOWN} [200, 32]" in found
    assert "missing: model.norm.weight [200]" in found
    assert f"misshapen: {GATE} is [200, 96], wanted [96, 200]" in found
    assert "misshapen: model.layers.0.mlp.router.classifier.weight is [8, 200], wanted [12, 200]" in found
    assert any(line.startswith("extra: model.layers.0.mlp.experts.12.up_proj.weight [32, 200]") for line in found)
    assert any(line.startswith("extra: model.rotary_emb.bias [4]") for line in found)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_shard_is_named(kept: int, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint.save(tensors, tmp_path, max_shard_size=200_000)
    shard = checkpoint.shards(tmp_path)[1]
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: truncated"):
        checkpoint.load(tmp_path, CONFIG)


def test_missing_shards_are_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint.save(tensors, tmp_path, max_shard_size=200_000)
    first, second, *_ = checkpoint.shards(tmp_path)
    first.unlink()
    second.unlink()
    with pytest.raises(CheckpointError, match=rf"do not exist: {first.name}, {second.name}"):
        checkpoint.verify(tmp_path, CONFIG)


def test_a_directory_without_safetensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        checkpoint.verify(tmp_path, CONFIG)


def test_only_shards_that_the_index_names_are_read(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint.save(tensors, tmp_path, max_shard_size=200_000)
    checkpoint.shards(tmp_path)[0].with_name("consolidated.safetensors").write_bytes(b"not ours")
    assert checkpoint.load(tmp_path, CONFIG).keys() == tensors.keys()


@pytest.mark.parametrize("is_indexed", [True, False])
@pytest.mark.parametrize("is_named", [True, False])
def test_the_auxiliary_file_is_read_whether_the_index_names_it_or_not(
    is_named: bool, is_indexed: bool, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    mtp = {name: tensor for name, tensor in tensors.items() if names.is_mtp(name)}
    checkpoint.save({name: tensor for name, tensor in tensors.items() if name not in mtp}, tmp_path, 200_000)
    save_file(mtp, tmp_path / checkpoint.AUXILIARY_NAME)
    index = tmp_path / checkpoint.INDEX_NAME
    if is_named:
        raw = json.loads(index.read_text())
        raw["weight_map"] |= dict.fromkeys(mtp, checkpoint.AUXILIARY_NAME)
        index.write_text(json.dumps(raw))
    if not is_indexed:
        index.unlink()
    checkpoint.verify(tmp_path, CONFIG, requires_mtp=True)
    assert checkpoint.load(tmp_path, CONFIG).keys() == tensors.keys()
    left_out = dict(checkpoint.unnamed_tensors(tmp_path))
    assert left_out.keys() == (mtp.keys() if is_indexed and not is_named else set())


# -- FP8 ---------------------------------------------------------------------------------------------


def in_fp8(tensors: dict[str, Tensor], chosen: Callable[[str], bool]) -> tuple[dict[str, Tensor], LongcatConfig]:
    """Chosen linear layers in FP8 with their scales, and the configuration that says so."""
    every = Quantization("fp8")
    linear = [name for name in tensors if every.is_fp8(name)]
    changed = dict(tensors)
    for name in filter(chosen, linear):
        changed[name], changed[f"{name}_scale_inv"] = quantize_blocks(tensors[name])
    ignored = tuple(name.removesuffix(".weight") for name in linear if not chosen(name))
    return changed, replace(CONFIG, quantization=replace(every, ignored=ignored))


def test_fp8_weights_are_read_as_their_numbers_times_their_scales(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    changed, config = in_fp8(tensors, lambda name: ".mlp.experts." in name or ".mlps." in name)
    (undeclared,) = problems(tmp_path, changed)
    assert undeclared.startswith("missing: quantization_config in config.json")
    read = checkpoint.load(tmp_path, config)
    assert read.keys() == tensors.keys()
    for name, tensor in read.items():
        if f"{name}_scale_inv" in changed:
            assert tensor.equal(dequantize_blocks(changed[name], changed[f"{name}_scale_inv"]))
            assert relative_error(tensor, tensors[name]) < 2**-4
        else:
            assert tensor.equal(tensors[name])


def test_a_quantisation_that_cannot_be_read_is_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint.save(tensors, tmp_path)
    with pytest.raises(CheckpointError, match="quant_method: 'gptq', wanted 'fp8'"):
        checkpoint.load(tmp_path, replace(CONFIG, quantization=Quantization("gptq")))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_positive_number_is_named(value: float, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    changed, config = in_fp8(tensors, lambda name: name == GATE)
    changed[f"{GATE}_scale_inv"][0, 0] = value
    (found,) = problems(tmp_path, changed, config)
    assert found.startswith(f"wrong: {GATE}_scale_inv has 1 scales such as ")
    with pytest.raises(CheckpointError, match="wanted finite numbers above 0"):
        list(audit.audited(iter(changed.items()), config, is_partial=False))


def test_a_tensor_in_another_precision_than_the_config_says_is_named(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    changed, config = in_fp8(tensors, lambda name: ".mlps." in name)
    other = GATE.replace("gate_proj", "down_proj")
    changed |= {GATE: tensors[GATE]}
    changed.pop(f"{GATE}_scale_inv")
    assert problems(tmp_path, changed, config) == [
        f"wrong: {GATE} is not in FP8, in config.json it is; add it to ignored_layers"
    ]
    changed, _ = in_fp8(tensors, lambda name: ".mlps." in name)
    assert config.quantization is not None
    ignoring = replace(config.quantization, ignored=(*config.quantization.ignored, other.removesuffix(".weight")))
    assert problems(tmp_path, changed, replace(config, quantization=ignoring)) == [
        f"wrong: {other} is in FP8, in config.json it is not; correct ignored_layers"
    ]


def test_of_the_mtp_layer_the_tensors_that_are_there_decide(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    _, config = in_fp8(tensors, lambda name: True)
    mixed, _ = in_fp8(tensors, lambda name: not name.startswith(names.MTP_PREFIX))
    checkpoint.save(mixed, tmp_path)
    checkpoint.verify(tmp_path, config)


def test_scales_of_a_tensor_that_is_not_in_fp8_are_extra(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    changed, config = in_fp8(tensors, lambda name: name == GATE)
    changed[GATE] = tensors[GATE]
    (found,) = problems(tmp_path, changed, config)
    assert found.startswith(f"extra: {GATE}_scale_inv, scales of a weight that is not in FP8")


def test_what_transformers_saves_beyond_the_published_tensors_is_passed_over(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    """It saves rows of its stacked experts for zero experts too."""
    experts = "model.layers.0.mlp.experts"
    gate = tensors[f"{experts}.0.gate_proj.weight"]
    extra = {f"{experts}.{CONFIG.n_routed_experts}.gate_proj.weight": torch.zeros_like(gate)}
    assert extra.keys().isdisjoint(tensors)
    write_checkpoint(tmp_path, CONFIG, tensors | extra)
    assert checkpoint.load(tmp_path, CONFIG).keys() == tensors.keys()


def test_an_fp8_weight_without_scales_is_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    tensors[GATE] = tensors[GATE].to(torch.float8_e4m3fn)
    found = problems(tmp_path, tensors)
    assert len(found) == 1
    assert found[0].startswith(f"missing: {GATE}_scale_inv")


def test_a_weight_in_e5m2_is_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    changed, config = in_fp8(tensors, lambda name: name == GATE)
    changed[GATE] = tensors[GATE].to(torch.float8_e5m2)
    assert problems(tmp_path, changed, config) == [
        f"wrong: {GATE} is in e5m2, wanted e4m3; convert the checkpoint again"
    ]


def test_fp8_scales_of_another_block_size_are_misshapen(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    changed, config = in_fp8(tensors, lambda name: name == GATE)
    changed[f"{GATE}_scale_inv"] = torch.ones(2, 4)
    assert problems(tmp_path, changed, config) == [f"misshapen: {GATE}_scale_inv is [2, 4], wanted [1, 2]"]


def test_scales_of_nothing_are_extra(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    tensors["model.nothing.weight_scale_inv"] = torch.ones(1, 1)
    assert problems(tmp_path, tensors)[0].startswith("extra: model.nothing.weight_scale_inv")


# -- the head and the MTP layer ------------------------------------------------------------------------


def test_a_tied_head_may_be_absent_or_saved_beside_its_embedding(tmp_path: Path) -> None:
    config = replace(CONFIG, tie_word_embeddings=True)
    tensors = published(config)
    assert "lm_head.weight" not in tensors
    write_checkpoint(tmp_path / "absent", config, tensors)
    write_checkpoint(tmp_path / "saved", config, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    for directory in ("absent", "saved"):
        assert checkpoint.load(tmp_path / directory, config).keys() == tensors.keys()


def test_an_untied_head_is_missed(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    del tensors["lm_head.weight"]
    assert problems(tmp_path, tensors) == ["missing: lm_head.weight [320, 200]"]


def test_a_checkpoint_without_an_mtp_layer_is_complete(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, published(CONFIG, with_mtp=False))
    checkpoint.verify(tmp_path, CONFIG)
    assert LongcatForCausalLM.from_checkpoint(tmp_path).model.mtp is None


def test_what_a_part_of_an_mtp_layer_lacks_is_listed(tmp_path: Path) -> None:
    whole, main = published(CONFIG), published(CONFIG, with_mtp=False)
    found = problems(tmp_path, {**main, MTP_NORM: whole[MTP_NORM]})
    missing = whole.keys() - main.keys() - {MTP_NORM}
    assert {line.split()[1] for line in found} == missing
    assert all(line.startswith("missing: ") for line in found)


# -- the audit of an engine that loads a part ----------------------------------------------------------


def test_an_engine_that_loads_a_part_can_ask_only_for_what_is_unexpected() -> None:
    audit = Audit(names.expected_tensors(CONFIG, with_mtp=True), CONFIG)
    shapes = names.expected_tensors(CONFIG, with_mtp=True)
    assert all(audit.accepts(name, shape, None) for name, shape in shapes.items() if plan.expert_of(name) != 3)
    audit.raise_for_unexpected()
    with pytest.raises(CheckpointError, match=DOWN):
        audit.raise_for_all()
    audit.accepts("model.nothing", (1,), None)
    with pytest.raises(CheckpointError, match=r"\(1 problems\)"):
        audit.raise_for_unexpected()


def test_a_tensor_with_a_problem_is_not_accepted() -> None:
    audit = Audit(names.expected_tensors(CONFIG, with_mtp=True), CONFIG)
    assert not audit.accepts("model.norm.weight", (201,), torch.float32)
    assert not audit.accepts("model.norm.bias", (200,), torch.float32)
    assert audit.accepts("model.norm.weight", (200,), torch.float32)


def test_the_router_is_published_in_fp32_beside_bf16() -> None:
    dtypes = {name: tensor.dtype for name, tensor in in_dtype(published(CONFIG), torch.bfloat16).items()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        "model.layers.0.mlp.router.classifier.weight",
        "model.layers.0.mlp.router.e_score_correction_bias",
    }


def test_the_index_is_that_of_hugging_face(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint.save(tensors, tmp_path, max_shard_size=200_000)
    index = json.loads((tmp_path / checkpoint.INDEX_NAME).read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


# -- what other software adds, and other layouts -------------------------------------------------------

HARMLESS = [
    "model.layers.0.self_attn.1.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "model.layers.0.self_attn.0.k_scale",
    "model.layers.0.self_attn.0.attn.v_scale",
    "model.layers.0.self_attn.0.kv_a_proj_with_mqa.kv_cache_scale",
    "model.mtp.lm_head.weight",
    "model.mtp.layers.0.shared_head.head.weight",
]


def test_tensors_that_do_no_harm_are_named_in_one_warning(
    tensors: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(tensors | {name: torch.zeros(2) for name in HARMLESS}, tmp_path)
    assert checkpoint.load(tmp_path, CONFIG).keys() == tensors.keys()
    (warning,) = [record.getMessage() for record in caplog.records if "does not read" in record.getMessage()]
    assert warning.endswith("does not read 7 tensors of the checkpoint: " + ", ".join(sorted(HARMLESS)))


def test_a_head_of_the_mtp_layer_alone_is_no_mtp_layer(tmp_path: Path) -> None:
    checkpoint.save({**published(CONFIG, with_mtp=False), "model.mtp.lm_head.weight": torch.zeros(2)}, tmp_path)
    checkpoint.verify(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match="no MTP layer"):
        checkpoint.verify(tmp_path, CONFIG, requires_mtp=True)


def stacked(tensors: dict[str, Tensor], zero_expert_rows: int) -> dict[str, Tensor]:
    """The same checkpoint with experts as transformers 5 holds them, some rows of zero experts included."""
    kept = {name: tensor for name, tensor in tensors.items() if plan.expert_of(name) is None}
    for n in range(CONFIG.num_layers):
        experts = f"model.layers.{n}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors[f"{experts}.{e}.{part}_proj.weight"] for e in range(CONFIG.n_routed_experts)])
            for part in ("gate", "up", "down")
        )
        gate_up = torch.cat((gate, up), dim=1)
        unread = torch.full((zero_expert_rows, *gate_up.shape[1:]), torch.nan)
        kept |= {f"{experts}.gate_up_proj": torch.cat((gate_up, unread)), f"{experts}.down_proj": down}
    return kept


@pytest.mark.parametrize("zero_expert_rows", [0, CONFIG.zero_expert_num])
def test_stacked_experts_are_read_as_the_published_ones(
    zero_expert_rows: int, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    given = stacked(tensors, zero_expert_rows)
    checkpoint.save(given, tmp_path)
    read = checkpoint.load(tmp_path, CONFIG)
    brought = dict(audit.audited(given.items(), CONFIG, is_partial=False))
    for found in (read, brought):
        assert found.keys() == tensors.keys()
        assert all(found[name].equal(tensor) for name, tensor in tensors.items())


def test_stacked_experts_of_another_size_are_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    given, name = stacked(tensors, 0), "model.layers.0.mlp.experts.gate_up_proj"
    given[name] = given[name][:-1]
    inner, hidden = CONFIG.expert_ffn_hidden_size, CONFIG.hidden_size
    wanted = f"wanted [{CONFIG.n_routed_experts}, {2 * inner}, {hidden}]"
    (problem,) = problems(tmp_path, given)
    assert problem.startswith(f"misshapen: {name} is ")
    assert problem.endswith(wanted)


def test_an_update_with_an_unknown_name_is_refused_before_anything_is_written(tensors: dict[str, Tensor]) -> None:
    update = {"model.norm.weight": tensors["model.norm.weight"], "model.norm.bias": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"extra: model\.norm\.bias"):
        audit.audited(update.items(), CONFIG, is_partial=True)


@pytest.mark.parametrize("break_it", [lambda file: file.symlink_to(file.with_name("nowhere")), Path.mkdir])
def test_a_file_that_cannot_be_read_is_named(
    break_it: Callable[[Path], None], tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    checkpoint.save(tensors, tmp_path)
    break_it(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors: (cannot be read|truncated or not safetensors)"):
        checkpoint.verify(tmp_path, CONFIG)
