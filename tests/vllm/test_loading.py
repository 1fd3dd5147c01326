"""vLLM's load formats: what is read by published names is checked beforehand, and everything else is let through."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from longcat_core.weights.audit import CheckpointError
from tests.cases import Case, write_checkpoint
from tests.engines.test_bad_checkpoints import CASE, EXPERT, TENSORS, refusal
from tests.vllm.engine import configure, serving

LACKING = {name: tensor for name, tensor in TENSORS.items() if name != EXPERT}
PROMPTS = CASE.prompts(3, 9)


@pytest.fixture
def lacking(tmp_path: Path) -> Path:
    """A checkpoint without one tensor."""
    return write_checkpoint(tmp_path / "lacking", CASE.config, LACKING)


def checked(model: str, load_format: str = "auto", **model_config: Any) -> None:
    """What is done with a checkpoint before workers start; no package that a format needs has to be there."""
    from longcat_vllm import loading

    asked = {"model": model, "model_weights": "", "revision": None, **model_config}
    loading.check(
        SimpleNamespace(
            model_config=SimpleNamespace(**asked),
            load_config=SimpleNamespace(load_format=load_format, download_dir=None),
            speculative_config=None,
        ),
        CASE.config,
    )


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What was said of a checkpoint that is not checked; vLLM's loggers do not hand on to pytest's."""
    logger = logging.getLogger("vllm.longcat_vllm.loading")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield lambda: caplog.text
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    "load_format", ["auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer"]
)
def test_what_is_read_from_safetensors_is_checked(load_format: str, lacking: Path) -> None:
    with pytest.raises(CheckpointError, match=f"missing: {EXPERT}"):
        checked(str(lacking), load_format)


@pytest.mark.parametrize(
    "load_format", ["sharded_state", "runai_streamer_sharded", "tensorizer", "pt", "npcache", "of_a_plugin"]
)
def test_what_is_not_read_from_safetensors_is_let_through_with_a_word(
    load_format: str, lacking: Path, said: Callable[[], str]
) -> None:
    checked(str(lacking), load_format)
    assert f"not checked before it is loaded: load format {load_format!r} reads no published names" in said()


def test_dummy_weights_have_nothing_to_check(lacking: Path, said: Callable[[], str]) -> None:
    checked(str(lacking), "dummy")
    assert said() == ""


def test_torch_files_alone_are_let_through_with_a_word(tmp_path: Path, said: Callable[[], str]) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    checked(str(tmp_path))
    assert f"{tmp_path} has torch's files only" in said()
    with pytest.raises(CheckpointError, match=r"no \*.safetensors"):
        checked(str(tmp_path), "safetensors")


def test_weights_in_a_bucket_are_let_through_with_a_word(tmp_path: Path, said: Callable[[], str]) -> None:
    """vLLM brings the small files of one into a directory of their own."""
    checked(str(tmp_path), "runai_streamer", model_weights="s3://bucket/longcat")
    assert "it is at s3://bucket/longcat" in said()


def hub_cache(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a checkpoint into a cache of the Hub as `huggingface_hub` does: a snapshot of links. Its snapshot."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--longcat"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for file in checkpoint.iterdir():
        file.rename(repository / "blobs" / f"blob-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-of-{file.name}")
    return snapshot


def test_a_name_of_the_hub_is_checked_where_its_cache_has_all_of_it(
    tmp_path: Path, lacking: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    snapshot = hub_cache(tmp_path, lacking, monkeypatch)
    with pytest.raises(CheckpointError, match=f"missing: {EXPERT}"):
        checked("org/longcat")
    (snapshot / "model.safetensors").unlink()
    checked("org/longcat")
    assert "org/longcat is not, or not wholly, in the Hub's cache here" in said()


def test_a_name_of_the_hub_is_served_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_cache(tmp_path, write_checkpoint(tmp_path / "good", CASE.config, TENSORS), monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert configure(Path("org/longcat")) == CASE.config


def test_a_saved_state_is_what_the_checkpoint_is(
    checkpoint_of: Callable[[Case], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As saved where no kernel packs weights, which is before that happens here; and not saved after it."""
    from vllm.model_executor.model_loader import ShardedStateLoader, base_loader

    def saving(model: torch.nn.Module, *rest: Any) -> None:
        ShardedStateLoader.save_model(model, str(tmp_path))
        process(model, *rest)

    process = base_loader.process_weights_after_loading
    (tmp_path / "config.json").write_text((checkpoint_of(CASE) / "config.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr(base_loader, "process_weights_after_loading", saving)
        with serving(checkpoint_of(CASE)) as served:
            answers = served.greedy(PROMPTS, 8)
            attention = served.model.model.layers[0].self_attn[0].attn
            assert attention.W_UV.shape[0] == CASE.config.num_attention_heads
            assert not [name for name in attention.state_dict() if name.startswith("W_U")]
            with pytest.raises(RuntimeError, match="packed for this device's kernel"):
                served.llm.llm_engine.engine_core.save_sharded_state(path=str(tmp_path / "packed"))
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model-rank-0-part-0.safetensors"]
    with serving(tmp_path, load_format="sharded_state") as served:
        assert served.greedy(PROMPTS, 8) == answers


def test_drafts_from_a_saved_state_are_refused(checkpoint_of: Callable[[Case], Path]) -> None:
    speculation = {"method": "mtp", "num_speculative_tokens": 1}
    message = refusal(checkpoint_of(CASE), load_format="sharded_state", speculative_config=speculation)
    assert "load_format: 'sharded_state', wanted one that reads a published checkpoint with drafts" in message


@pytest.mark.parametrize(
    ("kernel", "is_set_up", "is_saved"),
    [("TritonExperts", True, True), ("FlashInferExperts", True, False), ("FlashInferExperts", False, True)],
)
def test_experts_that_a_gpus_kernel_has_rearranged_are_not_saved(
    kernel: str, is_set_up: bool, is_saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashInfer's has the up projections above the gates."""
    from longcat_vllm import devices
    from longcat_vllm.devices.cuda.device import Cuda
    from longcat_vllm.moe import ZeroExpertAwareExperts

    monkeypatch.setattr(devices, "current", Cuda)
    experts = ZeroExpertAwareExperts.__new__(ZeroExpertAwareExperts)
    torch.nn.Module.__init__(experts)
    vars(experts)["moe_config"] = SimpleNamespace(moe_parallel_config=SimpleNamespace(enable_eplb=False))
    experts.quant_method = SimpleNamespace(experts_cls=type(kernel, (), {}), moe_kernel=object() if is_set_up else None)
    experts.w2_weight = torch.nn.Parameter(torch.zeros(1))
    if is_saved:
        assert list(experts.state_dict()) == ["w2_weight"]
    else:
        with pytest.raises(RuntimeError, match="packed for this device's kernel"):
            experts.state_dict()
