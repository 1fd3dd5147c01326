"""A release in FP8 is served as the model whose weights are its FP8 numbers times their scales."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longcat_core.parallel.location import PLACES
from longcat_core.quantization import Quantization
from longcat_core.weights.audit import CheckpointError
from longcat_core.weights.names import MTP_PREFIX, SCALE_SUFFIX
from tests.cases import drafting_tensors, published, write_checkpoint
from tests.fp8 import CLEAR, CONFIG, VERY_CLEAR, dequantised, released
from tests.harness import engine
from tests.oracle import greedy, oracle, oracle_logits, typical_error

PLAIN = replace(CONFIG, quantization=None)
PROMPT = torch.randint(CONFIG.vocab_size, (90,), generator=torch.Generator().manual_seed(0)).tolist()
CHUNK = 32

FP8 = Quantization("fp8")
QUANTIZATIONS: dict[str, Quantization] = {
    "all": FP8,
    "no_attention": Quantization("fp8", disabled=("self_attn",)),
    "no_dense_ffn": Quantization("fp8", disabled=("mlps",)),
    "mixed": Quantization(
        "fp8",
        ignored=(
            "model.layers.0.self_attn.1",  # one attention of two
            "model.layers.1.self_attn.0.kv_a_proj_with_mqa",  # half of a fused layer
            "model.layers.0.mlps.1.down_proj",
            "model.layers.1.mlps.0.gate_proj",
            *(f"model.layers.1.mlp.experts.{n}.{part}_proj" for n in range(8) for part in ("gate", "up", "down")),
        ),
    ),
    "blocks_of_64": Quantization("fp8", block=(64, 64)),
}


def release(quantization: Quantization, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return released(replace(CONFIG, quantization=quantization), tensors)


def write(quantization: Quantization, tensors: dict[str, Tensor], directory: Path) -> Path:
    return write_checkpoint(directory, replace(CONFIG, quantization=quantization), tensors)


class Truth:
    """The exact model of a release, and how far from it an engine is with the same weights in a bf16 checkpoint."""

    def __init__(self, tensors: dict[str, Tensor], block: tuple[int, int], directory: Path) -> None:
        model = oracle(PLAIN, dequantised(tensors, block=block))
        self._log_softmax = oracle_logits(model, torch.tensor([PROMPT]))[0, :-1].log_softmax(dim=-1)
        self._tokens = greedy(model, PROMPT[:40], 12)
        write_checkpoint(directory, PLAIN, dequantised(tensors, torch.bfloat16, block))
        with engine.serving(directory, dtype="bfloat16", chunk=CHUNK) as served:
            self._error_of_bf16 = self._error(served)
            (self._tokens_of_bf16,) = served.greedy([PROMPT[:40]], 12)

    def _error(self, served: engine.Engine) -> float:
        return typical_error(served.log_softmax(PROMPT, CONFIG.vocab_size), self._log_softmax)

    def check(self, served: engine.Engine) -> None:
        assert self._error(served) <= 1.5 * self._error_of_bf16, "typical_error"
        (tokens,) = served.greedy([PROMPT[:40]], 12)
        for token, wanted, of_bf16 in zip(tokens, self._tokens, self._tokens_of_bf16, strict=True):
            # In bf16 logits are off by 0.1, so that the engine may choose another token with a bf16 checkpoint as well.
            if wanted.margin <= CLEAR or of_bf16 != wanted.token:
                break
            assert token == wanted.token


@pytest.fixture(scope="module")
def truth_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Truth]]:
    """The directory of a release, and its truth."""

    @cache
    def made(name: str) -> tuple[Path, Truth]:
        quantization = QUANTIZATIONS[name]
        tensors = release(quantization, published(CONFIG))
        directory = tmp_path_factory.mktemp(name)
        truth = Truth(tensors, quantization.block, directory / "bf16")
        return write(quantization, tensors, directory / "fp8"), truth

    return made


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_release_in_fp8_is_the_model_that_it_stands_for(
    name: str, truth_of: Callable[[str], tuple[Path, Truth]]
) -> None:
    directory, truth = truth_of(name)
    with engine.serving(directory, dtype="bfloat16", chunk=CHUNK) as served:
        truth.check(served)
        before = served.cached_tokens
        (again,) = served.greedy([PROMPT[:40]], 12)
        assert again == served.greedy([PROMPT[:40]], 12)[0]
        assert served.cached_tokens > before


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_fp8_on_two_ranks(expert_parallel: bool, truth_of: Callable[[str], tuple[Path, Truth]]) -> None:
    directory, truth = truth_of("all")
    with engine.serving(
        directory,
        dtype="bfloat16",
        tensor_parallel=2,
        expert_parallel=expert_parallel,
        **(engine.AS_THE_STOCK_COMMAND if expert_parallel else {}),
    ) as served:
        truth.check(served)


def test_fp8_experts_are_loaded_with_their_scales_wherever_they_are(
    truth_of: Callable[[str], tuple[Path, Truth]], tmp_path: Path
) -> None:
    directory, truth = truth_of("all")
    places = [[*reversed(range(CONFIG.n_routed_experts)), 0, 0]] * CONFIG.num_layers
    (tmp_path / "places.json").write_text(json.dumps({PLACES: places}))
    asked = engine.placed(tmp_path / "places.json", redundant=2)
    with engine.serving(directory, dtype="bfloat16", tensor_parallel=2, expert_parallel=True, **asked) as served:
        truth.check(served)


def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longcat_core.kernels.cpu.product.is_available", lambda: False)


def test_without_a_compiler_a_release_is_dequantised(truth_of: Callable[[str], tuple[Path, Truth]]) -> None:
    directory, truth = truth_of("all")
    with engine.serving(directory, dtype="bfloat16", broken=without_a_compiler) as served:
        truth.check(served)


# -- what is read wrong shows ------------------------------------------------------------------------


Change = Callable[[str, Tensor], Tensor]


def _given(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break an engine's reading: every tensor of a right checkpoint is changed before it is loaded. All of it can be
    pickled, for an engine of another process."""
    model = import_module(f"{engine.PACKAGE}.model")
    monkeypatch.setattr(model, "dequantized", partial(_changed, change, model.dequantized))


def _changed(change: Change, original: Any, weights: Iterable[tuple[str, Tensor]], *rest: Any) -> Any:
    return original(((name, change(name, tensor)) for name, tensor in weights), *rest)


def _without_scales(of: str, name: str, tensor: Tensor) -> Tensor:
    return torch.ones_like(tensor) if name.endswith(f"{of}.weight{SCALE_SUFFIX}") else tensor


def _scales_left_out(of: str) -> Callable[[pytest.MonkeyPatch], None]:
    return partial(_given, partial(_without_scales, of))


def _blocks_mixed_up(name: str, tensor: Tensor) -> Tensor:
    return tensor.flip(0) if name.endswith(SCALE_SUFFIX) else tensor


@pytest.mark.parametrize(
    "break_it",
    [
        _scales_left_out("self_attn.0.kv_b_proj"),
        _scales_left_out("self_attn.1.kv_a_proj_with_mqa"),
        _scales_left_out("mlps.1.up_proj"),
        partial(_given, _blocks_mixed_up),
    ],
    ids=["absorbed weights", "half of a fused layer", "the other half", "blocks"],
)
def test_scales_that_are_lost_or_mixed_up_show(
    break_it: Callable[[pytest.MonkeyPatch], None], truth_of: Callable[[str], tuple[Path, Truth]]
) -> None:
    directory, truth = truth_of("all")
    with engine.serving(directory, dtype="bfloat16", broken=break_it) as served, pytest.raises(AssertionError):
        truth.check(served)


def test_a_layer_in_bf16_is_not_read_as_fp8(tmp_path: Path) -> None:
    """The config calls the tensor FP8, and the file has it in bf16."""
    ignored = Quantization("fp8", ignored=("model.layers.0.mlps.1.down_proj",))
    write(FP8, release(ignored, published(CONFIG)), tmp_path)
    with pytest.raises((CheckpointError, ValueError), match=r"0\.mlps\.1\.down_proj\.weight is not in FP8"):
        engine.configure(tmp_path, dtype="bfloat16")


# -- drafts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draft_tokens", "chunk", "says", "has"),
    [
        (3, None, FP8, FP8),
        (1, 16, FP8, Quantization("fp8", disabled=("mtp",))),
        (1, 16, Quantization("fp8", disabled=("mtp",)), FP8),
    ],
    ids=["FP8", "bf16, and the config says FP8", "FP8, and the config says bf16"],
)
def test_drafts_come_from_the_mtp_layer_that_is_there(
    draft_tokens: int, chunk: int | None, says: Quantization, has: Quantization, tmp_path: Path
) -> None:
    tensors = release(has, drafting_tensors(CONFIG))
    fp8 = write(says, tensors, tmp_path / "fp8")
    bf16 = write_checkpoint(tmp_path / "bf16", PLAIN, dequantised(tensors, torch.bfloat16))
    prompts = [PROMPT[start : start + length] for start in range(0, 90, 18) for length in (3, 17, 40)]
    model = oracle(PLAIN, dequantised(tensors))
    truths = [[*takewhile(lambda each: each.margin > VERY_CLEAR, greedy(model, prompt, 24))] for prompt in prompts]
    assert any(truths), "no token is clear"
    accepted = {}
    for directory in (fp8, bf16):
        with engine.serving(directory, dtype="bfloat16", draft_tokens=draft_tokens, chunk=chunk) as served:
            for answers in (served.speculated(prompts, 24), served.speculated(prompts, 24)):  # then with prefix hits
                for answer, truth in zip(answers, truths, strict=True):
                    assert answer.tokens[: len(truth)] == [each.token for each in truth]
        accepted[directory] = sum(sum(each.accepted) for each in answers) / sum(len(each.accepted) for each in answers)
    assert 0.1 < accepted[bf16] < 0.95 * draft_tokens
    assert accepted[fp8] == pytest.approx(accepted[bf16], rel=0.25)


def test_the_mtp_layers_tensors_are_in_fp8_in_these_tests() -> None:
    in_fp8 = [name for name in release(FP8, drafting_tensors(CONFIG)) if name.startswith(MTP_PREFIX)]
    assert f"{MTP_PREFIX}layers.0.eh_proj.weight{SCALE_SUFFIX}" in in_fp8
