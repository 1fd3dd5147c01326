"""Weights that SGLang reads and writes otherwise than by a first load of published tensors."""
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

from longcat_core import spellings
from longcat_core.weights.names import SCALE_SUFFIX
from longcat_sglang import updates
from tests import fp8
from tests.cases import CASES, Case, published, write_checkpoint
from tests.engines.test_fp8 import without_a_compiler
from tests.oracle import assert_greedy_equal, greedy, oracle, oracle_logits, typical_error
from tests.sglang.engine import Engine, serving

CASE = CASES["default"]


def test_an_update_from_a_disk_is_in_the_next_token_or_not_at_all(
    checkpoint_of: Callable[[Case], Path], tmp_path: Path
) -> None:
    tensors, prompt = CASE.published(seed=1), CASE.prompts(1, 20)[0]
    before, after = (greedy(oracle(CASE.config, weights), prompt, 8) for weights in (CASE.published(), tensors))
    assert [choice.token for choice in before] != [choice.token for choice in after]
    with serving(checkpoint_of(CASE), prefix_caching=False) as served:
        assert_greedy_equal(served.greedy([prompt], 8)[0], before)
        succeeded, message, *_ = served.sglang.update_weights_from_disk(
            str(write_checkpoint(tmp_path, CASE.config, tensors))
        )
        assert succeeded, message
        assert_greedy_equal(served.greedy([prompt], 8)[0], after)
        for lacking in ("model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.0.self_attn.1.o_proj.weight"):
            others = {name: tensor for name, tensor in CASE.published().items() if name != lacking}
            of_torch = tmp_path / "of_torch" / lacking
            of_torch.mkdir(parents=True)
            (of_torch / "config.json").write_text(json.dumps(spellings.published(CASE.config)))
            torch.save(others, of_torch / "pytorch_model.bin")
            seen_beforehand = write_checkpoint(tmp_path / lacking, CASE.config, others)
            for directory, way_back in ((seen_beforehand, ""), (of_torch, "; the weights of before were read again")):
                succeeded, message, *_ = served.sglang.update_weights_from_disk(str(directory))
                assert not succeeded
                assert f"missing: {lacking}" in message
                assert message.endswith(way_back)
                assert_greedy_equal(served.greedy([prompt], 8)[0], after)


@pytest.mark.parametrize("is_kept", [True, False], ids=["in FP8", "dequantised"])
def test_weights_in_fp8_are_replaced_from_a_disk_and_from_tensors(is_kept: bool, tmp_path: Path) -> None:
    config, plain = fp8.CONFIG, replace(fp8.CONFIG, quantization=None)
    prompt = torch.randint(config.vocab_size, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    releases = [fp8.released(config, published(config, seed)) for seed in (0, 1)]
    truths = [
        oracle_logits(oracle(plain, fp8.dequantised(tensors)), torch.tensor([prompt]))[0, :-1].log_softmax(dim=-1)
        for tensors in releases
    ]
    directories = [write_checkpoint(tmp_path / str(n), config, tensors) for n, tensors in enumerate(releases)]

    def which(served: Engine) -> int:
        logits = served.log_softmax(prompt, config.vocab_size)
        (found,) = (n for n, truth in enumerate(truths) if typical_error(logits, truth) < 0.01)
        return found

    broken = None if is_kept else without_a_compiler
    with serving(directories[0], dtype="bfloat16", prefix_caching=False, broken=broken) as served:
        assert which(served) == 0
        succeeded, message, *_ = served.sglang.update_weights_from_disk(str(directories[1]))
        assert succeeded, message
        assert which(served) == 1
        weight = "model.layers.0.self_attn.0.o_proj.weight"
        if not is_kept:
            refused = served.refused_update({weight: releases[0][weight]})
            assert f"missing: {weight}{SCALE_SUFFIX}, without which {weight} cannot be read" in refused
            assert which(served) == 1
        served.update(releases[0])
        assert which(served) == 0
        in_bf16 = fp8.dequantised(releases[1], torch.bfloat16)
        if is_kept:
            assert "wanted torch.float8_e4m3fn" in served.refused_update({weight: in_bf16[weight]})
            assert which(served) == 0
        else:
            served.update(in_bf16)
            assert which(served) == 1, "whatever the precision of an update is"


class Updater:
    """SGLang's, of a model of the default case; reading from a path that is called broken fails."""

    def __init__(self, path: str) -> None:
        self.model_config = SimpleNamespace(model_path=path)
        self.model = SimpleNamespace(config=SimpleNamespace(longcat=CASE.config), checkpoint=None, is_drafter=False)
        self.read: list[tuple[str, str]] = []
        self.directories: list[Path | None] = []

    def get_model(self) -> Any:
        return self.model

    def update(self, model_path: str, load_format: str, recapture_cuda_graph: bool = False) -> tuple[bool, str]:
        assert not recapture_cuda_graph
        assert self.model.checkpoint is not None
        self.model_config.model_path = model_path
        if load_format == "dummy":
            return False, "Failed to get model loader"
        self.read.append((model_path, load_format))
        self.directories.append(self.model.checkpoint.directory)
        if model_path.endswith("broken"):
            raise OSError("the disk is gone")
        return True, "read"


@pytest.mark.parametrize("is_there", [True, False], ids=["the old files are there", "nor the old ones"])
def test_after_an_error_the_weights_of_before_are_read_again(
    is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt import runtime_context

    settings = SimpleNamespace(revision=None, download_dir=None, speculative_algorithm=None)
    monkeypatch.setattr(runtime_context, "get_server_args", lambda: settings)
    monkeypatch.setattr(runtime_context, "get_model", lambda: SimpleNamespace(load_format="safetensors"))
    old = str(tmp_path / ("old" if is_there else "old and broken"))
    broken = str(write_checkpoint(tmp_path / "broken", CASE.config, CASE.published()))
    if is_there:
        write_checkpoint(Path(old), CASE.config, CASE.published())
    updater = Updater(old)
    updater.model.is_drafter = is_there
    read = partial(updates.read_a_whole_checkpoint, Updater.update, updater, recapture_cuda_graph=False)
    if is_there:
        assert read(broken, "auto") == (
            False,
            "the disk is gone; the weights of before were read again; the target has the new ones",
        )
    else:
        with pytest.raises(OSError, match="the disk is gone"):
            read(broken, load_format="auto")
    assert updater.read == [(broken, "auto"), (old, "safetensors")]
    assert updater.directories[1] == (Path(old) if is_there else None), "where an auxiliary file is read, too"
    assert updater.model.checkpoint is None
    lacking = write_checkpoint(
        tmp_path / "lacking", CASE.config, {"lm_head.weight": CASE.published()["lm_head.weight"]}
    )
    succeeded, message = read(str(lacking), "auto")
    assert not succeeded
    assert "missing: model.norm.weight" in message
    assert len(updater.read) == 2, "it is not read at all"
    at = updater.model_config.model_path
    assert read(broken, "dummy") == (False, "Failed to get model loader")
    assert updater.model_config.model_path == at, "for the way back of the next update"


def test_weights_that_sglang_has_saved_are_the_same_when_it_loads_them(
    checkpoint_of: Callable[[Case], Path], tmp_path: Path
) -> None:
    prompts = CASE.prompts(2, 20)
    (tmp_path / "config.json").write_text(json.dumps(spellings.published(CASE.config)))
    with serving(checkpoint_of(CASE), tensor_parallel=2) as served:
        tokens = served.greedy(prompts, 8)
        served.sglang.save_sharded_model(path=str(tmp_path), pattern=None, max_size=None)
        assert served.greedy(prompts, 8) == tokens, "saving changes nothing"
    with serving(tmp_path, tensor_parallel=2, load_format="sharded_state") as served:
        assert served.greedy(prompts, 8) == tokens
        served.update({"model.norm.weight": CASE.published()["model.norm.weight"]})
        assert served.greedy(prompts, 8) == tokens, "a part of the weights can be updated"
