"""Decode with FlashInfer's MLA: each query sees its request's tokens and no others, whatever was planned."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm.utils.flashinfer

from longcat_core import spellings
from longcat_core.plugin.requested import Requested
from longcat_vllm import requested
from longcat_vllm.devices.cuda import device
from longcat_vllm.devices.cuda.decode_plan import DecodeStep
from tests.cases import DEFAULT, Case
from tests.engines.test_bad_checkpoints import CASE, refusal
from tests.vllm import flashinfer_mla
from tests.vllm.decode_batches import Batch, plans


@pytest.fixture(autouse=True)
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(
        BatchMLAPagedAttentionWrapper=flashinfer_mla.Wrapper, MLAPlanMetadata=flashinfer_mla.MLAPlanMetadata
    )
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(mla=module))
    monkeypatch.setitem(sys.modules, "flashinfer.mla", module)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", [[5], [4, 40, 700, 17, 16], [1000, 4, 64]], ids=str)
def test_each_query_sees_its_request_up_to_itself(count: int, lengths: list[int]) -> None:
    batch = Batch([count] * len(lengths), lengths)
    torch.testing.assert_close(batch.attend(plans().plan(batch.step())), batch.expected())


def test_requests_have_different_numbers_of_queries() -> None:
    batch = Batch([1, 4, 2, 3], [9, 300, 33, 4])
    torch.testing.assert_close(batch.attend(plans().plan(batch.step())), batch.expected())


@pytest.mark.parametrize("num_heads", [8, 16, 32, 64])
@pytest.mark.parametrize("rejected", [[0, 1, 3], [3, 3, 3], [16, 40, 0]], ids=str)
def test_tokens_that_only_the_host_counts_are_not_read(num_heads: int, rejected: list[int]) -> None:
    """Of 255 and 3 rejected tokens, a piece of work would have the tokens from 256 on."""
    batch = Batch([2, 2, 2], [2, 255, 640], num_heads)
    torch.testing.assert_close(batch.attend(plans(num_heads).plan(batch.step(rejected))), batch.expected())


def test_a_plan_that_is_not_shortened_reads_them() -> None:
    """What the two tests above would not see, if the bound were right by chance."""
    batch = Batch([2], [33])
    step = batch.step([3])
    wrapper = plans().plan(DecodeStep(step.query_starts, 2, step.length_bounds, step.length_bounds, step.block_table))
    assert batch.attend(wrapper).isnan().any()


@pytest.mark.parametrize("drafts", [0, 1])
@pytest.mark.parametrize(("requests", "padding"), [(1, 0), (3, 1), (5, 3), (9, 7), (12, 0)])
def test_padding_of_a_graph_changes_neither_results_nor_launches(requests: int, padding: int, drafts: int) -> None:
    """A graph keeps the grid, the tiles and all addresses of the step at which it was captured."""
    shared = plans(num_drafts=drafts)
    full = Batch([2] * (requests + padding), [3 + 50 * index for index in range(requests + padding)], seed=1)
    captured = shared.plan(full.step())
    kept = list(captured._planned_backend._plan_info), captured.buffers["kv_indices"].data_ptr()
    batch = Batch([2] * requests, [900 - 70 * index for index in range(requests)])
    wrapper = shared.plan(batch.step([drafts] * requests, padding))
    assert wrapper is captured
    assert (list(wrapper._planned_backend._plan_info), wrapper.buffers["kv_indices"].data_ptr()) == kept
    output = batch.attend(wrapper, padding)
    torch.testing.assert_close(output[: 2 * requests], batch.expected())
    assert not output[2 * requests :].any()


@pytest.mark.parametrize(("requests", "blocks"), [(1, 2), (2, 2), (3, 2), (96, 2), (128, 2)])
def test_a_token_and_its_draft_fill_a_tile_of_128_rows(requests: int, blocks: int) -> None:
    batch = Batch([2] * requests, [20] * requests)
    assert plans(max_requests=256).plan(batch.step())._planned_backend._plan_info[0] == blocks


def test_a_step_may_have_any_number_of_requests_up_to_the_limit() -> None:
    shared = plans(num_heads=8)
    for requests in (16, 1, 7, 16):
        batch = Batch([1] * requests, [3 * index + 1 for index in range(requests)], num_heads=8, seed=requests)
        torch.testing.assert_close(batch.attend(shared.plan(batch.step())), batch.expected())


def test_another_layout_of_the_plan_is_refused_before_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the option to leave out is one that there is. Without drafts the plan is not written to."""
    as_in_0_7 = flashinfer_mla.plan
    monkeypatch.setattr(flashinfer_mla, "plan", lambda *given: [*as_in_0_7(*given), 0])
    with pytest.raises(RuntimeError, match=r"plan has 19 fields, wanted 18 as in FlashInfer 0\.7") as refused:
        plans()
    assert f"leave {requested.OPTIONS['flashinfer_mla']} out" in str(refused.value)
    plans(num_drafts=0)


# -- the option --------------------------------------------------------------------------------------------


HOPPER, BLACKWELL = (9, 0), (10, 0)


def obstacles(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, is_installed: bool = True, **options: object
) -> list[str]:
    config = replace(DEFAULT, kv_lora_rank=512, qk_rope_head_dim=64)
    monkeypatch.setattr(device, "capability", lambda: capability)
    monkeypatch.setattr(vllm.utils.flashinfer, "has_flashinfer", lambda: is_installed)
    hf_config = spellings.published(options.pop("config", config))
    asked = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf_config),
        attention_config=SimpleNamespace(backend=options.pop("backend", None)),
        parallel_config=SimpleNamespace(decode_context_parallel_size=options.pop("dcp", 1)),
    )
    return device.Cuda().obstacles_to_flashinfer_mla(asked)


def test_the_backend_is_used_on_request_on_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from longcat_vllm.devices.cuda.attention import FlashInferPagedMLABackend

    assert device.Cuda().attention_backend() is None
    monkeypatch.setattr(requested, "current", lambda: Requested(flashinfer_mla=True))
    assert device.Cuda().attention_backend() is FlashInferPagedMLABackend
    assert obstacles(monkeypatch, HOPPER) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"capability": BLACKWELL}, "compute capability 10.0, wanted Hopper's"),
        ({"capability": None}, "no GPU of NVIDIA's, wanted Hopper's"),
        ({"is_installed": False}, "vLLM finds no FlashInfer; install flashinfer-python"),
        ({"config": DEFAULT}, f"latent {DEFAULT.kv_lora_rank} and rope {DEFAULT.qk_rope_head_dim}, wanted 512 and 64"),
        ({"backend": SimpleNamespace(name="FLASHMLA")}, "attention_backend is FLASHMLA; leave --attention-backend out"),
        ({"dcp": 2}, "decode_context_parallel_size is 2, wanted 1"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_it_cannot_serve_is_said(given: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = obstacles(monkeypatch, **{"capability": HOPPER, **given})
    assert message in problem


def test_on_a_cpu_it_is_refused(checkpoint_of: Callable[[Case], Path]) -> None:
    message = refusal(checkpoint_of(CASE), additional_config={"longcat": {"flashinfer_mla": True}})
    assert '"flashinfer_mla": true}}\': it is for NVIDIA GPUs, and this is a CPU; or leave it out' in message
