"""Decode steps on a CPU in which vLLM's modules have to be called; `engines/test_decoding.py` has the others."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longcat_core.kernels.cpu import library
from longcat_core.kernels.cpu.decoder import DecoderLayer
from longcat_core.layers.latent_attention import PagedBatch
from longcat_nano import CHECKPOINT
from longcat_vllm.devices.cpu import decoding
from longcat_vllm.devices.cpu.attention import LatentAttentionMetadata
from tests.harness import engine

pytestmark = pytest.mark.skipif(not library.is_available(), reason=library.description())
NEW_TOKENS, PROMPT = 12, list(range(5, 45))
OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "prefix_caching": False}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of core's layers."""
    call, noted = DecoderLayer.__call__, list[int]()

    def noting(layer: DecoderLayer, *args: Any) -> Any:
        noted.append(len(args[0]))
        return call(layer, *args)

    monkeypatch.setattr(DecoderLayer, "__call__", noting)
    return noted


def test_a_module_that_a_user_hooks_is_called_as_long_as_it_is_hooked(passes: list[int]) -> None:
    seen: list[int] = []
    with engine.serving(CHECKPOINT, **OPTIONS) as served:
        first = served.greedy([PROMPT], NEW_TOKENS)
        assert passes.count(1) >= NEW_TOKENS - 1
        layers: Any = served.model.model.layers  # type: ignore[union-attr]  # torch's annotation of attributes
        handle = layers[1].mlp.router.register_forward_hook(lambda _module, given, _output: seen.append(len(given[0])))
        passes.clear()
        assert served.greedy([PROMPT], NEW_TOKENS) == first
        assert not passes
        assert seen.count(1) >= NEW_TOKENS - 1
        handle.remove()
        served.greedy([PROMPT], NEW_TOKENS)
        assert passes


def test_layers_that_adapters_change_are_called(passes: list[int]) -> None:
    with engine.serving(CHECKPOINT, **OPTIONS, enable_lora=True, max_lora_rank=8) as served:
        served.greedy([PROMPT], NEW_TOKENS)
    assert not passes


def test_a_cache_in_another_dtype_is_attended_to_by_vllms_layers(passes: list[int]) -> None:
    with engine.serving(CHECKPOINT, **OPTIONS, kv_cache_dtype="float16", draft_tokens=2) as served:
        assert [len(tokens) for tokens in served.greedy([PROMPT], NEW_TOKENS)] == [NEW_TOKENS]
    assert not passes


def test_drafts_of_greedy_requests_have_no_probabilities_of_those_that_sampled_before() -> None:
    drafts = {"method": "mtp", "num_speculative_tokens": 2, "draft_sample_method": "probabilistic"}
    with engine.serving(CHECKPOINT, **OPTIONS, speculative_config=drafts) as served:
        short = [PROMPT[:10], PROMPT[:12]]  # with more tokens at once vLLM drafts the first, and forgets the others
        first = served.greedy(short, NEW_TOKENS)
        served.sampled(PROMPT, NEW_TOKENS, [1.0])
        assert served.greedy(short, NEW_TOKENS) == first


@pytest.mark.parametrize(
    ("change", "is_told"),
    [
        ({}, True),
        ({"attn_metadata": None}, False),  # a profiling run
        ({"attn_metadata": [{}, {}]}, False),  # two microbatches
        ({"slot_mapping": {}}, False),
        ({"tokens": 3}, False),  # of which one pads the step
        ({"gives_its_cache_away": True}, False),
    ],
)
def test_a_step_is_told_of_all_tokens_or_left_to_vllm(
    change: dict[str, Any], is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = PagedBatch([0, 1, 2], [5, 7], torch.zeros(2, 8, dtype=torch.int64), block_size=16)
    metadata = LatentAttentionMetadata(batch, num_actual_tokens=2, num_prefills=2)
    context = {"attn_metadata": {"layer": metadata}, "slot_mapping": {"layer": torch.tensor([4, 22])}} | change
    monkeypatch.setattr(decoding, "get_forward_context", lambda: SimpleNamespace(**context))
    monkeypatch.setattr(decoding, "has_kv_transfer_group", lambda: context.get("gives_its_cache_away", False))
    step = decoding.step_of(SimpleNamespace(layer_name="layer"), context.get("tokens", 2))
    assert (step is not None) == is_told
    if step is not None:
        assert step.batch is batch
        assert step.slots.tolist() == [4, 22]
