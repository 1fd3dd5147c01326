"""Rows by expert against the reference, and against what a matrix product needs of them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longcat_core.kernels import arrange as kernels
from longcat_core.kernels.arrange import Arrangement, arrange, arrange_reference, worst_case_rows


def random_ids(seed: int, tokens: int, top_k: int, num_experts: int, kept: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(num_experts, (tokens, top_k), generator=generator, dtype=torch.int32)
    return ids.masked_fill(torch.rand(tokens, top_k, generator=generator) >= kept, -1)


def random_map(seed: int, experts: int, local: int) -> Tensor:
    """The local numbers, in any order, of `local` of so many experts."""
    generator = torch.Generator().manual_seed(seed)
    expert_map = torch.full((experts,), -1, dtype=torch.int32)
    expert_map[torch.randperm(experts, generator=generator)[:local]] = torch.arange(local, dtype=torch.int32)
    return expert_map


def assert_arranged(ours: Arrangement, ids: Tensor, experts: int, block: int, expert_map: Tensor | None = None) -> None:
    slots, of_blocks, used = arrange_reference(ids, experts, block, expert_map)
    assert ours.used_rows.tolist() == [used]
    assert ours.slots[:used].tolist() == slots
    assert ours.experts[: used // block].tolist() == of_blocks
    local = ids if expert_map is None else torch.where(ids >= 0, expert_map[ids.clamp(min=0)], -1)
    assert torch.equal(ours.local_ids, local)
    assert {tensor.dtype for tensor in ours} == {torch.int32}
    assert ours.slots.numel() == worst_case_rows(ids.numel(), experts, block) == ours.experts.numel() * block


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 12),
    top_k=st.integers(1, 12),
    experts=st.integers(1, 128),
    kept=st.sampled_from([0.0, 0.5, 1.0]),
    block=st.sampled_from([1, 2, 16, 64]),
    has_map=st.booleans(),
    launches=st.sampled_from([1, 3]),
)
def test_rows_are_in_the_order_of_the_reference(
    seed: int, tokens: int, top_k: int, experts: int, kept: float, block: int, has_map: bool, launches: int
) -> None:
    """With one launch or three; three are otherwise for more than 1,024 choices only."""
    local = 1 + seed % experts if has_map else experts
    expert_map = random_map(seed, experts, local) if has_map else None
    ids = random_ids(seed, tokens, top_k, experts, kept)
    with pytest.MonkeyPatch.context() as patch:
        if launches == 3:
            patch.setattr(kernels, "ONE_LAUNCH", 0)
            patch.setattr(kernels, "_CHUNK", 32)
        assert_arranged(arrange(ids, local, block, expert_map), ids, local, block, expert_map)


@pytest.mark.parametrize(("tokens", "experts"), [(85, 512), (86, 512), (180, 60)])
def test_more_choices_than_one_launch_takes(tokens: int, experts: int) -> None:
    ids = random_ids(0, tokens, 12, experts, 0.7)
    assert_arranged(arrange(ids, experts, 16), ids, experts, 16)


@pytest.mark.parametrize("tokens", [7, 100])
def test_one_expert_may_have_all_rows(tokens: int) -> None:
    ids = torch.full((tokens, 12), 3, dtype=torch.int32)
    ours = arrange(ids, 4, 16)
    assert_arranged(ours, ids, 4, 16)
    assert ours.used_rows.tolist() == [-(-tokens * 12 // 16) * 16]


def test_zero_experts_alone_have_no_block() -> None:
    assert arrange(torch.full((9, 12), -1, dtype=torch.int32), 64, 16).used_rows.tolist() == [0]
    assert arrange(torch.empty(0, 12, dtype=torch.int32), 64, 16).used_rows.tolist() == [0]


def test_the_worst_case_is_enough_and_no_more() -> None:
    for choices, experts, block in [(24, 5, 16), (5, 24, 16), (33, 3, 1), (64, 4, 64)]:
        ids = (torch.arange(choices) % experts).int().unsqueeze(1)  # as many experts as can be, none with a full block
        used = arrange_reference(ids, experts, block)[2]
        assert used <= worst_case_rows(choices, experts, block)
    spread = torch.tensor([0] * 17 + [1] * 17 + [2] * 30, dtype=torch.int32).unsqueeze(1)
    assert arrange_reference(spread, 3, 16)[2] == 96
    assert worst_case_rows(64, 3, 16) == 96
    assert worst_case_rows(5, 24, 16) == 5 * 16  # a block for each choice


@pytest.mark.parametrize(
    ("ids", "experts", "block", "message"),
    [
        (torch.zeros(1, 4, dtype=torch.int32), 1025, 16, "1025 local experts: wanted 1 to 1024"),
        (torch.zeros(1, 4, dtype=torch.int32), 4, 24, "blocks of 24 rows: wanted a power of two"),
        (torch.zeros(1, 4, dtype=torch.int64), 4, 16, "ids of torch.int64"),
        (torch.zeros(2, 4, dtype=torch.int32).T, 4, 16, "wanted contiguous int32"),
    ],
)
def test_what_cannot_be_arranged_is_an_error(ids: Tensor, experts: int, block: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arrange(ids, experts, block)
