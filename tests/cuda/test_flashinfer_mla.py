"""FlashInfer's own wrapper takes what our plans give it: all of its Python runs, with a stand-in for its kernels."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vllm import flashinfer_mla
from tests.vllm.decode_batches import Batch, plans

fa3_backend = pytest.importorskip(
    "flashinfer.mla._batch_mla._backends.fa3_backend", reason="FlashInfer is part of .venv-cuda"
)


class Kernels:
    """The compiled part of FlashInfer's MLA, `batch_mla_sm90_{plan,run}.cu`."""

    num_sms = 12

    def plan_with_staged_workspace_bytes(
        self,
        _workspace: Tensor,
        workspace: Tensor,
        _staging: Tensor,
        query_starts: Tensor,
        page_starts: Tensor,
        lengths: Tensor,
        num_heads: int,
        _latent: int,
        causal: bool,
    ) -> tuple[list[int], int]:
        assert causal
        return flashinfer_mla.plan(workspace, query_starts, page_starts, lengths, num_heads, self.num_sms), 0

    def run(self, _workspace: Tensor, workspace: Tensor, info: list[int], *arguments: Any) -> None:
        q_nope, q_rope, latents, ropes, pages, output, _lse, _mask, num_heads, page_size, scale, *_ = arguments
        assert num_heads == q_nope.shape[1]
        output.copy_(flashinfer_mla.run(workspace, info, (q_nope, q_rope), (latents, ropes), pages, page_size, scale))


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, empty = Kernels(), torch.empty

    def without_pinning(*arguments: Any, pin_memory: bool = False, **settings: Any) -> Tensor:
        return empty(*arguments, **settings)

    monkeypatch.setattr(torch, "empty", without_pinning)
    monkeypatch.setattr(fa3_backend, "get_batch_mla_module", lambda *_: kernels)


def half(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].bfloat16(), pair[1].bfloat16()


@pytest.mark.filterwarnings("error:.*deprecated")
def test_flashinfer_takes_our_plan_and_each_query_sees_its_request() -> None:
    shared = plans(dtype=torch.bfloat16)
    for requests, padding in ((3, 1), (9, 7), (12, 0)):
        batch = Batch([2] * requests, [700 - 50 * index for index in range(requests)], seed=requests)
        wrapper = shared.plan(batch.step([1] * requests, padding))
        nope, rope = half(batch.with_padding(padding))
        output = wrapper.run(query=(nope, rope), kv_cache=half((batch.latents, batch.ropes)))
        torch.testing.assert_close(output[: 2 * requests].float(), batch.expected(), atol=3e-2, rtol=3e-2)
