"""SGLang's own Triton experts, as this package sets them up on a GPU: a choice of -1 has no row in a product."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests.interpreted import ERROR_OF_FP8, Layer, fp8_layer, layers
from tests.sglang.interpreted.gpu import computed

HALF = layers(torch.float16)  # SGLang computes what is not in bf16 in fp16
own = partial(computed, kernels=False)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("layer", HALF, ids=lambda layer: layer.name)
def test_rows_of_dropped_choices_are_not_computed(layer: Layer, ranks: int) -> None:
    for rank in range(ranks):
        run = own(layer, rank=rank, ranks=ranks)
        assert layer.error(run.output, rank, ranks) < 2e-3
        assert run.activated == (~layer.is_dropped(rank, ranks)).sum()


def test_nor_are_those_of_experts_in_fp8() -> None:
    layer = fp8_layer(torch.bfloat16)
    run = own(layer)
    assert layer.error(run.output) < ERROR_OF_FP8
    assert run.activated == (~layer.is_dropped()).sum()


def as_sglang_counts(experts: Any) -> None:
    """As many experts as the rank has, so that nothing is filtered."""
    experts.moe_runner_config.num_experts = experts.num_local_experts


def with_sglangs_table(experts: Any) -> None:
    """Of the FFN experts alone: -1 is the last one."""
    experts.dispatcher.local_expert_mapping = experts.dispatcher.local_expert_mapping[:-1]


def test_without_more_experts_than_there_are_sglang_still_sums_what_is_not_written() -> None:
    """If this fails, the number of experts may have become unnecessary (`moe._skip_zero_experts`)."""
    assert own(HALF[0], broken=as_sglang_counts).output.isnan().any()


def test_with_a_table_of_ffn_experts_sglang_still_computes_zero_experts_on_the_last_rank() -> None:
    """If this fails, the longer table may have become unnecessary (`moe._skip_zero_experts`)."""
    run = own(HALF[0], rank=1, ranks=2, broken=with_sglangs_table)
    assert run.activated is not None
    assert run.activated > (~HALF[0].is_dropped(1, 2)).sum()
