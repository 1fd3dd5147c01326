"""SGLang's table of slots is as wide as the longest context there may be: a step reads the columns that it needs."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from longcat_sglang.devices.cpu.attention import DraftingBackend, LatentAttentionBackend
from tests.core.test_latent_attention import Largest

CONTEXT, ROWS, LENGTHS = 131_072, [5, 0, 3], [40, 30, 55]
TABLE = torch.arange(6 * CONTEXT, dtype=torch.int32).view(6, CONTEXT)
RUNNER: Any = SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=TABLE), token_to_kv_pool=None)


def batch(mode: ForwardMode, **fields: Any) -> Any:
    lengths, rows = torch.tensor(LENGTHS), torch.tensor(ROWS)
    return SimpleNamespace(forward_mode=mode, seq_lens=lengths, req_pool_indices=rows, spec_info=None, **fields)


def test_a_decode_step_reads_the_columns_in_use() -> None:
    backend = LatentAttentionBackend(RUNNER)
    with Largest(TABLE) as largest:
        backend.init_forward_metadata_out_graph(batch(ForwardMode.DECODE))
    assert 0 < largest.elements <= len(LENGTHS) * max(LENGTHS)
    assert backend.forward_metadata is not None
    for group in backend.forward_metadata.groups:
        for request, slots in zip(group.queries[:, 0].tolist(), group.slots, strict=True):
            assert torch.equal(slots[: LENGTHS[request]], TABLE[ROWS[request], : LENGTHS[request]].long())


@pytest.mark.parametrize("branches", [1, 3])
def test_a_draft_step_reads_the_columns_in_use_and_those_that_drafts_write(branches: int) -> None:
    steps = 4
    backend = DraftingBackend(RUNNER, branches, steps)
    with Largest(TABLE) as largest:
        backend.init_forward_metadata(batch(ForwardMode.DECODE))
    assert 0 < largest.elements <= len(LENGTHS) * branches * (max(LENGTHS) + branches * steps)
    for step, each in enumerate(backend.attn_backends):
        assert each.forward_metadata is not None
        for group in each.forward_metadata.groups:
            for place, slots in zip(group.queries[:, 0].tolist(), group.slots, strict=True):
                request, branch = divmod(place, branches)
                length, row = LENGTHS[request], TABLE[ROWS[request]].long()
                own = row[length + branch * steps :][: step + 1]
                assert torch.equal(slots[: length + step + 1], torch.cat((row[:length], own)))
