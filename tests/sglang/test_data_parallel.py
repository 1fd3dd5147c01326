"""Data-parallel attention on a CPU: ranks with requests of their own share dense FFNs and experts."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.server_args import ZMQ_TCP_PORT_DELTA
from torch import Tensor

from longcat_cli.make_checkpoint import make_checkpoint
from longcat_core.quantization import Quantization
from longcat_core.reference import LongcatForCausalLM
from longcat_sglang import metrics
from longcat_sglang.devices.cpu import attention, patches, platform
from tests import requests
from tests.cases import Case
from tests.engines.test_metrics import assert_counts_what_the_reference_chooses
from tests.engines.test_scheduling import assert_true, prompts, truth
from tests.engines.test_speculation import assert_drafts_are_the_references, assert_tokens
from tests.fp8 import Release
from tests.oracle import assert_greedy_equal
from tests.server import serving as serving_over_http
from tests.sglang import engine
from tests.sglang.engine import serving
from tests.sglang.test_speculation import answers
from tests.speculation import CASE

NEW_TOKENS = 16


def data_parallel(ranks: int) -> dict[str, Any]:
    """Engine arguments: two groups of ranks with requests of their own."""
    return {"tensor_parallel": ranks, "dp_size": 2, "enable_dp_attention": True, "port": port_before_free_ones()}


def port_before_free_ones() -> int:
    """SGLang's processes then talk over the seven ports that come 233 after the server's; below those that the system
    gives to whoever asks for any."""
    while True:
        port = random.randrange(10_000, 30_000)
        if all(is_free(port + ZMQ_TCP_PORT_DELTA + n) for n in range(7)):
            return port


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_tokens_of_all_ranks_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests go to one rank after the other; the first one counts."""
    for name, value in engine.environment_of_ranks(2).items():
        monkeypatch.setenv(name, value)
    directory = tmp_path / "checkpoint"
    make_checkpoint(directory, requests.CASE.config, seed=0, dtype=torch.float32)
    command = [*engine.command(directory, served_name=requests.MODEL), *engine.expert_parallel_flags(2)]
    with serving_over_http([*command, "--dp-size", "2", "--enable-dp-attention"], tmp_path / "server.log") as server:
        assert_counts_what_the_reference_chooses(server, LongcatForCausalLM.from_checkpoint(directory).eval(), ranks=2)


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_ranks_with_other_requests_have_the_tokens_of_one_rank(
    expert_parallel: bool, checkpoint_of: Callable[[Case], Path]
) -> None:
    with serving(checkpoint_of(CASE), chunk=16, expert_parallel=expert_parallel, **data_parallel(2)) as served:
        assert_true(served)
        for prompt, wanted in list(zip(prompts(), truth(), strict=True))[-2:]:  # while the other rank has none
            assert_greedy_equal(served.greedy([prompt], NEW_TOKENS)[0], wanted)


@pytest.mark.by_hand
def test_two_pairs_of_ranks_that_share_experts_have_the_tokens_of_one_rank(
    checkpoint_of: Callable[[Case], Path],
) -> None:
    """Both of a pair attend to the same requests."""
    with serving(checkpoint_of(CASE), expert_parallel=True, **data_parallel(4)) as served:
        assert_true(served)


@pytest.mark.by_hand
@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("quantization", [None, Quantization("fp8")], ids=["bf16", "FP8"])
def test_in_bf16_and_fp8_ranks_choose_what_is_clear(
    quantization: Quantization | None, expert_parallel: bool, tmp_path: Path
) -> None:
    release, asked = Release(quantization), prompts()
    with serving(
        release.write(tmp_path), dtype="bfloat16", chunk=16, expert_parallel=expert_parallel, **data_parallel(2)
    ) as served:
        release.assert_chooses_what_is_clear(served.greedy(asked, NEW_TOKENS), asked)
        release.assert_chooses_what_is_clear(served.greedy(asked[:1], NEW_TOKENS), asked[:1])  # the other has none


@pytest.mark.parametrize("ranks", [2, 4])
def test_drafts_are_those_of_one_rank(ranks: int, drafting_checkpoint_of: Callable[[Case], Path]) -> None:
    """Of four ranks two have the same requests each, and rows are added until they can be divided by two."""
    with serving(drafting_checkpoint_of(CASE), draft_tokens=3, expert_parallel=True, **data_parallel(ranks)) as served:
        assert_drafts_are_the_references(served, 3)
        hot = answers(served, *[{"temperature": 5.0}] * 3)  # a batch of one, and one of two
        assert len({tuple(tokens) for tokens in hot}) == 3
        assert_tokens(served)


# -- the pieces --------------------------------------------------------------------------------------


def attended(monkeypatch: pytest.MonkeyPatch, mode: ForwardMode, tokens: int, rows: int) -> tuple[Tensor, list[int]]:
    """What `attend` makes of rows of ones, and of how many rows the attention was asked; it doubles them."""
    asked: list[int] = []

    def double(_attention: Any, _backend: Any, hidden_states: Tensor, _batch: Any, cos: Tensor, sin: Tensor) -> Tensor:
        assert len(hidden_states) == len(cos) == len(sin)
        asked.append(len(hidden_states))
        return 2 * hidden_states

    backend = object.__new__(attention.LatentAttentionBackend)
    backend.tokens = tokens
    monkeypatch.setattr(attention, "get_attn_backend", lambda: backend)
    monkeypatch.setattr(attention, "_attend", double)
    given, angles, batch = torch.ones(rows, 4), torch.ones(rows, 1, 2), SimpleNamespace(forward_mode=mode)
    unused: Any = None
    return attention.attend(unused, given, batch, angles, angles), asked  # type: ignore[arg-type]


def test_rows_that_pad_a_rank_are_not_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    output, asked = attended(monkeypatch, ForwardMode.EXTEND, tokens=3, rows=4)
    assert asked == [3]
    assert torch.equal(output, torch.tensor([2.0, 2, 2, 0]).unsqueeze(1).expand(4, 4))


def test_a_rank_without_requests_attends_to_nothing_whatever_it_did_before(monkeypatch: pytest.MonkeyPatch) -> None:
    output, asked = attended(monkeypatch, ForwardMode.IDLE, tokens=2, rows=2)
    assert asked == []
    assert torch.equal(output, torch.zeros(2, 4))


def test_requests_that_pad_a_rank_have_chains_for_trees() -> None:
    leaves = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]).bool()
    padded = attention._one_for_each(leaves, 3)
    assert torch.equal(padded[:1], leaves)
    assert padded[1:].int().tolist() == [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]] * 2
    assert torch.equal(attention._one_for_each(leaves, 1), leaves)


def test_a_rank_takes_its_rows_of_a_sum() -> None:
    group = object.__new__(GroupCoordinator)
    group.world_size, group.rank_in_group = 2, 1
    vars(group)["all_reduce"] = lambda rows: 10 * rows
    rows = torch.arange(3.0).unsqueeze(1)
    unused: Any = None
    taken = patches.sum_and_take_own_rows(unused, group, rows, sizes=[1, 2])
    assert torch.equal(taken, torch.tensor([[10.0], [20.0]]))


@pytest.mark.parametrize(("is_of_attention", "ranks"), [(False, 4), (True, 2)])
def test_data_parallel_attention_has_no_ranks_beside_the_tensor_parallel_ones(
    is_of_attention: bool, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def cores_of(numa_index: int, world_size: int) -> str:
        asked.append(world_size)
        return "0"

    found = SimpleNamespace(tp_size=2, dp_size=2, enable_dp_attention=is_of_attention, gpu_id=0)
    for name in ("get_parallel", "get_device"):
        monkeypatch.setattr(f"sglang.srt.runtime_context.{name}", lambda: found)
    monkeypatch.setattr("sglang.srt.utils.numa_utils.init_threads_binding", cores_of)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    platform.bind_rank_to_its_cores()
    assert asked == [ranks]


def test_each_rank_with_requests_of_its_own_counts_accepted_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(enable_metrics=True, tp_rank=1, attn_tp_rank=0)
    for name in ("get_observability", "get_parallel"):
        monkeypatch.setattr(metrics, name, lambda: found)
    monkeypatch.setattr(metrics, "AcceptedDrafts", lambda: "counted")
    assert metrics._accepted_drafts.__wrapped__() == "counted"
    found.attn_tp_rank = 1
    assert metrics._accepted_drafts.__wrapped__() is None


# -- what the patch is for is still so ---------------------------------------------------------------


def test_sglang_still_divides_a_sum_by_nccl_alone() -> None:
    """If this fails, the row "sum and division by ranks" may have become unnecessary."""
    group = object.__new__(GroupCoordinator)
    group.world_size, group.rank_in_group, group.pynccl_comm = 2, 0, None
    with pytest.raises(AttributeError, match="change_state"):
        group.reduce_scatterv(torch.ones(2, 1), sizes=[1, 1])
