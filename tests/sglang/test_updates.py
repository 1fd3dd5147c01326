"""Weights that SGLang reads and writes otherwise than by a first load of published tensors."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longcat_core import spellings
from longcat_core.weights.names import SCALE_SUFFIX
from tests import fp8
from tests.cases import CASES, Case, published, write_checkpoint
from tests.engines.test_fp8 import without_a_compiler
from tests.oracle import assert_greedy_equal, greedy, oracle, oracle_logits, typical_error
from tests.sglang.engine import Engine, serving

CASE = CASES["default"]


def test_an_update_from_a_disk_is_in_the_next_token(checkpoint_of: Callable[[Case], Path], tmp_path: Path) -> None:
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
