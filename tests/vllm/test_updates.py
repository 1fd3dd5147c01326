"""New weights for a running vLLM: a layer has all of its new weights or those of before, and what lacks is named."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader import reload as reloading
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

from longcat_core.weights.audit import CheckpointError
from longcat_core.weights.names import MTP_PREFIX, SCALE_SUFFIX, is_mtp
from longcat_vllm import devices
from longcat_vllm.devices.cuda.device import Cuda
from tests import fp8
from tests.cases import CASES, drafting_tensors, published, write_checkpoint
from tests.vllm import fp8_kernels
from tests.vllm.engine import Engine, serving

CASE = CASES["default"]
OLD, NEW = CASE.published(), CASE.published(seed=1)
STACK = "model.layers.1.mlp.experts"
LAST_OF_STACK = f"{STACK}.7.up_proj.weight"
Weights = dict[str, Tensor]


def without(tensors: Weights, *names: str) -> Weights:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


WRONG: dict[str, Weights] = {
    LAST_OF_STACK: without(NEW, LAST_OF_STACK),
    "model.layers.0.self_attn.1.o_proj.weight": without(NEW, "model.layers.0.self_attn.1.o_proj.weight"),
    "extra: model.norm.bias": NEW | {"model.norm.bias": torch.zeros(64)},
    "misshapen: model.norm.weight": NEW | {"model.norm.weight": torch.zeros(65)},
}
"""New weights, and what is wrong with each."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of the new weights, by what is wrong with them."""
    root = tmp_path_factory.mktemp("checkpoints")
    checkpoints = {"old": OLD, "new": NEW, **WRONG}
    return {name: write_checkpoint(root / name, CASE.config, tensors) for name, tensors in checkpoints.items()}


@pytest.fixture(scope="module")
def served(directories: dict[str, Path]) -> Iterator[Engine]:
    with serving(directories["old"], prefix_caching=False, **TRANSFER) as engine:
        yield engine


@pytest.fixture
def state(served: Engine) -> Weights:
    """All weights before an update, which are the old ones."""
    served.update(OLD)
    return state_of(served.model)


def state_of(model: torch.nn.Module) -> Weights:
    """Of every parameter; where a kernel has taken a layer's weight away, what the layer makes of the unit matrix."""
    found: Weights = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.numel():
                found[f"{prefix}.{name}"] = parameter.detach().clone()
            else:
                columns = module.embedding_dim if prefix == "lm_head" else module.input_size
                unit = torch.eye(columns, dtype=parameter.dtype)
                found[f"{prefix}.{name}"] = module.quant_method.apply(module, unit).clone()
    return found


def changed(model: torch.nn.Module, before: Weights) -> set[str]:
    """The parameters that are not as before."""
    after = state_of(model)
    assert after.keys() == before.keys()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def reload(served: Engine, **given: Any) -> None:
    served.llm.collective_rpc("reload_weights", kwargs=given)


class HandedOver(WeightTransferEngine[Any, Any]):
    """An engine of weight transfer as vLLM's own, whose chunks come with the call."""

    def init_transfer_engine(self, init_info: Any) -> None: ...

    def receive_weights(self, update_info: Any) -> None: ...

    def shutdown(self) -> None: ...

    def start_weight_update(self) -> None:
        reloading.initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: Weights) -> None:
        self.model.load_weights(list(update_info.items()))

    def finish_weight_update(self) -> None:
        reloading.finalize_layerwise_reload(self.model, self.model_config)


WeightTransferEngineFactory.register_engine("handed_over", HandedOver)
TRANSFER = {"weight_transfer_config": WeightTransferConfig(backend="handed_over")}


def update_in_chunks(served: Engine, chunks: Iterable[Weights], start: str = "start_weight_update") -> None:
    rpc = served.llm.collective_rpc
    rpc(start)
    for chunk in chunks:
        rpc("update_weights", args=(chunk,))
    try:
        rpc("finish_weight_update")
    except CheckpointError:
        rpc("finish_weight_update")  # else vLLM takes it for open, and starts no other
        raise


# -- an update that ends in an error -----------------------------------------------------------------


def test_an_error_in_the_middle_leaves_half_a_stack_of_experts_as_it_was(served: Engine, state: Weights) -> None:
    def failing() -> Iterator[tuple[str, Tensor]]:
        yield "model.layers.0.mlps.0.down_proj.weight", NEW["model.layers.0.mlps.0.down_proj.weight"]
        for name in NEW:
            if name == LAST_OF_STACK:
                raise OSError("the disk is gone")
            if name.startswith(STACK):
                yield name, NEW[name]

    with pytest.raises(CheckpointError, match="the disk is gone") as refused:
        reload(served, weights_iterator=failing())
    assert "New weights are in 1 of the model's layers already" in str(refused.value)
    assert "model.layers.0.mlps.0.down_proj" in str(refused.value)
    assert changed(served.model, state) == {"model.layers.0.mlps.0.down_proj.weight"}
    served.update(OLD)
    assert not changed(served.model, state), "and can be updated again"


def test_an_error_in_the_first_layer_names_no_new_ones(served: Engine, state: Weights) -> None:
    def failing() -> Iterator[tuple[str, Tensor]]:
        yield LAST_OF_STACK, NEW[LAST_OF_STACK]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match=r"^the disk is gone$"):
        reload(served, weights_iterator=failing())
    assert not changed(served.model, state)


def test_a_correction_bias_that_is_new_already_is_named(served: Engine, state: Weights) -> None:
    """vLLM never sets it aside."""
    name = "model.layers.1.mlp.router.e_score_correction_bias"

    def failing() -> Iterator[tuple[str, Tensor]]:
        yield name, NEW[name]
        raise OSError("the disk is gone")

    with pytest.raises(CheckpointError, match=r"1 of the model's layers .* model\.layers\.1\.mlp\.router$"):
        reload(served, weights_iterator=failing())
    assert changed(served.model, state) == {name}


# -- an update that lacks tensors --------------------------------------------------------------------


HALVES = {
    LAST_OF_STACK: "model.layers.1.mlp.experts.routed_experts.",
    "model.layers.0.self_attn.1.q_a_proj.weight": "model.layers.0.self_attn.1.fused_qkv_a_proj.",
    "model.layers.0.mlps.1.up_proj.weight": "model.layers.0.mlps.1.gate_up_proj.",
}
"""A published tensor, and vLLM's layer that would have it with others."""


@pytest.mark.parametrize("lacking", HALVES)
@pytest.mark.parametrize("is_in_memory", [True, False], ids=["in memory", "as they come"])
def test_a_layer_of_which_a_part_came_stays_as_it_was(
    is_in_memory: bool, lacking: str, served: Engine, state: Weights
) -> None:
    tensors = without(NEW, lacking).items()
    with pytest.raises(CheckpointError, match=f"a part only of {HALVES[lacking][:-1]}: ") as refused:
        reload(served, weights_iterator=tensors if is_in_memory else iter(tensors))
    assert str(refused.value).endswith(f"(1 problems):\n  missing: {lacking}")
    kept = {name for name in state if name.startswith(HALVES[lacking])}
    assert kept
    assert changed(served.model, state) == state.keys() - kept


def test_what_comes_in_chunks_is_counted_over_all_of_them(served: Engine, state: Weights) -> None:
    names = sorted(NEW)
    update_in_chunks(served, ({name: NEW[name]} for name in names))
    assert changed(served.model, state) == state.keys()
    served.update(OLD)
    with pytest.raises(CheckpointError, match=f"missing: {LAST_OF_STACK}$"):
        update_in_chunks(served, ({name: NEW[name]} for name in names if name != LAST_OF_STACK))
    kept = {name for name in state if name.startswith(HALVES[LAST_OF_STACK])}
    assert changed(served.model, state) == state.keys() - kept


def test_a_tensor_that_comes_twice_is_not_taken_for_one_that_lacks(served: Engine, state: Weights) -> None:
    """vLLM counts numbers, and would think that the stack is complete."""
    stack = without({name: tensor for name, tensor in NEW.items() if name.startswith(STACK)}, LAST_OF_STACK)
    again = f"{STACK}.0.up_proj.weight"
    with pytest.raises(CheckpointError, match=f"^twice: {again} came before"):
        update_in_chunks(served, [stack, {again: NEW[again]}])
    assert not changed(served.model, state)


def test_whole_layers_can_be_updated_alone(served: Engine, state: Weights) -> None:
    prefix = "model.layers.1."
    served.update({name: tensor for name, tensor in NEW.items() if name.startswith(prefix)})
    assert changed(served.model, state) == {name for name in state if name.startswith(prefix)}


def test_an_update_that_was_never_finished_is_forgotten(served: Engine, state: Weights) -> None:
    """As vLLM's `sharded_rdt` leaves one, with the layers put back by itself."""
    reloading.initialize_layerwise_reload(served.model)
    served.model.load_weights([(LAST_OF_STACK, NEW[LAST_OF_STACK])])
    for module in served.model.modules():
        info = get_layerwise_info(module)
        if info.can_load():
            _place_kernel_tensors(module, info)
        info.reset()
    update_in_chunks(served, [])
    assert not changed(served.model, state)
    served.update(NEW)
    assert changed(served.model, state) == state.keys()


def test_vllm_still_fills_what_a_layer_lacks_from_uninitialised_memory(
    served: Engine, state: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, the hook at the end of a weight update can go."""
    monkeypatch.setattr(torch, "empty_strided", partial(full_strided, 7.0))
    layer = served.model.model.layers[0].mlps[1].gate_up_proj
    reloading.initialize_layerwise_reload(layer)
    layer.weight.weight_loader(layer.weight, NEW["model.layers.0.mlps.1.up_proj.weight"], 1)
    reloading.finalize_layerwise_reload(layer, None)
    gate, up = layer(torch.eye(CASE.config.hidden_size))[0].T.chunk(2)
    torch.testing.assert_close(up, NEW["model.layers.0.mlps.1.up_proj.weight"])
    assert (gate == 7.0).all()


def full_strided(value: float, size: Any, stride: Any, **options: Any) -> Tensor:
    return torch.full(size, value, dtype=options["dtype"])


# -- a reload from a checkpoint ----------------------------------------------------------------------


@pytest.mark.parametrize("wrong", list(WRONG))
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(
    wrong: str, directories: dict[str, Path], served: Engine, state: Weights
) -> None:
    with pytest.raises(CheckpointError, match=r"\(1 problems\)") as refused:
        reload(served, weights_path=str(directories[wrong]))
    assert wrong in str(refused.value)
    assert not changed(served.model, state)
    reload(served)
    assert not changed(served.model, state), "without a path it reads the weights that are served"


def test_torchs_files_that_lack_a_tensor_are_refused_too(
    tmp_path: Path, directories: dict[str, Path], served: Engine, state: Weights
) -> None:
    """They cannot be checked beforehand."""
    lacking = "model.layers.0.self_attn.1.o_proj.weight"
    (tmp_path / "config.json").write_bytes((directories["new"] / "config.json").read_bytes())
    torch.save(without(NEW, lacking), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"missing: {lacking}") as refused:
        reload(served, weights_path=str(tmp_path))
    assert "repeat the update before the model is used" in str(refused.value)
    assert {name for name in state if name.startswith(lacking)} == state.keys() - changed(served.model, state)


def test_a_checkpoint_that_fits_replaces_all_weights(
    directories: dict[str, Path], served: Engine, state: Weights
) -> None:
    reload(served, weights_path=str(directories["new"]))
    assert changed(served.model, state) == state.keys()
    reload(served, weights_path=str(directories["old"]))
    assert not changed(served.model, state)


# -- drafts ------------------------------------------------------------------------------------------


def test_new_weights_of_drafts_are_in_the_next_draft(tmp_path: Path) -> None:
    """vLLM's route /start_draft_weight_update."""
    old = drafting_tensors(CASE.config)
    drafts = {name: tensor for name, tensor in old.items() if is_mtp(name)}
    others = {name: NEW[name] for name in drafts}
    gate = f"{MTP_PREFIX}layers.0.transformer_layer.mlp.gate_proj.weight"
    directory, prompts = write_checkpoint(tmp_path, CASE.config, old), CASE.prompts(2, 20)
    with serving(directory, draft_tokens=2, prefix_caching=False, **TRANSFER) as served:
        before = served.speculated(prompts, 24)
        assert all(sum(answer.accepted) > 4 for answer in before)
        update = partial(update_in_chunks, served, start="start_draft_weight_update")
        with pytest.raises(CheckpointError, match=r"missing: model\.mtp\.layers\.0\.transformer_layer\.mlp\.up_proj"):
            update([{gate: others[gate]}])
        assert served.speculated(prompts, 24) == before
        update({name: tensor} for name, tensor in others.items())
        after = served.speculated(prompts, 24)
        assert [answer.tokens for answer in after] == [answer.tokens for answer in before]
        assert all(sum(answer.accepted) < 4 for answer in after)
        update([drafts])
        assert served.speculated(prompts, 24) == before


# -- FP8 ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["kept", "dequantised"])
def served_fp8(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Weights that stay in FP8, and weights that do not, for want of a kernel."""
    tensors = fp8.released(fp8.CONFIG, published(fp8.CONFIG))
    directory = write_checkpoint(tmp_path_factory.mktemp("fp8"), fp8.CONFIG, tensors)
    broken = None if request.param else without_fp8_kernels
    with serving(directory, dtype="bfloat16", prefix_caching=False, broken=broken, **TRANSFER) as engine:
        yield engine


def without_fp8_kernels(patch: pytest.MonkeyPatch) -> None:
    fp8_kernels.remove_cores(patch)
    patch.setattr("longcat_vllm.devices.cpu.fp8._has_vllms", lambda: False)


def test_fp8_weights_and_their_scales_may_come_in_chunks_of_their_own(served_fp8: Engine) -> None:
    releases = [fp8.released(fp8.CONFIG, published(fp8.CONFIG, seed)) for seed in (0, 1)]
    before = state_of(served_fp8.model)
    for release in reversed(releases):
        scales = {name: tensor for name, tensor in release.items() if name.endswith(SCALE_SUFFIX)}
        update_in_chunks(served_fp8, [without(release, *scales), scales])
        assert bool(changed(served_fp8.model, before)) is (release is releases[1])


@pytest.mark.parametrize("suffix", ["", SCALE_SUFFIX], ids=["weight", "scales"])
def test_half_of_an_fp8_weight_is_refused_at_the_end_of_an_update(suffix: str, served_fp8: Engine) -> None:
    release = fp8.released(fp8.CONFIG, published(fp8.CONFIG, seed=1))
    weight = "model.layers.0.self_attn.0.o_proj.weight"
    given, missing = (weight, weight + SCALE_SUFFIX) if not suffix else (weight + SCALE_SUFFIX, weight)
    before = state_of(served_fp8.model)
    with pytest.raises(CheckpointError, match=f"missing: {missing}$"):
        update_in_chunks(served_fp8, [{given: release[given]}])
    assert not changed(served_fp8.model, before)
    update_in_chunks(served_fp8, [])


@pytest.mark.parametrize("device", [None, Cuda])
def test_fp8_weights_are_not_written_in_place(device: Any, served_fp8: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a call of `load_weights`, as trainers make: vLLM arranges them, or their scales, anew for some kernels."""
    if device is not None:
        monkeypatch.setattr(devices, "current", device)
    release = fp8.released(fp8.CONFIG, published(fp8.CONFIG, seed=1))
    weight = "model.layers.0.self_attn.0.o_proj.weight"
    before = state_of(served_fp8.model)
    is_kept = before[weight].dtype == torch.float8_e4m3fn
    both = [(weight, release[weight]), (weight + SCALE_SUFFIX, release[weight + SCALE_SUFFIX])]
    if is_kept:
        for given in (both, both[1:]):
            with pytest.raises(CheckpointError, match="update them with vLLM's reload_weights"):
                served_fp8.model.load_weights(given)
        assert not changed(served_fp8.model, before)
    else:
        with pytest.raises(CheckpointError, match="give both"):
            served_fp8.model.load_weights(both[1:])
        assert not changed(served_fp8.model, before)
