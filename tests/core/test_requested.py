"""What is requested of longcat-serving itself, and where its kernels cannot be used."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from longcat_core.config import LongcatConfig
from longcat_core.plugin.kernels import obstacles_to_kernels
from longcat_core.plugin.requested import Requested, refuse_what_the_own_class_lacks
from longcat_core.quantization import Quantization
from tests.cases import DEFAULT

OPTIONS = {"draft_gate": "--more draft_gate", "kernels": "--more kernels"}


def test_nothing_is_requested_unless_it_is_said() -> None:
    assert Requested.read({}, OPTIONS, "our_", "--more") == Requested(draft_gate=False, kernels=False)
    assert Requested.read({"kernels": True}, OPTIONS, "our_", "--more") == Requested(kernels=True)
    assert Requested.read({"draft_gate": True, "kernels": False}, OPTIONS, "our_", "--more") == Requested(
        draft_gate=True
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gate": True}, "our_gate: wanted our_draft_gate or our_kernels; correct --more"),
        ({"kernels": "file"}, "our_kernels: 'file', wanted true or false; correct --more"),
        ({"kernels": 1}, "our_kernels: 1, wanted true or false; correct --more"),
        (True, "--more: True for longcat, wanted our_draft_gate or our_kernels in it"),
    ],
)
def test_what_is_no_option_of_ours_is_named(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Requested.read(given, OPTIONS, "our_", "--more")


def test_an_object_is_read_where_one_is_wanted_and_is_not_lost_if_it_is_empty() -> None:
    options = OPTIONS | {"eplb": "--more eplb"}
    assert Requested.read({"eplb": {"window_size": 5}}, options, "our_", "--more").eplb == {"window_size": 5}
    with pytest.raises(ValueError, match="our_eplb: True, wanted an object; correct --more"):
        Requested.read({"eplb": True}, options, "our_", "--more")
    with pytest.raises(ValueError, match="--more eplb: X's own class"):
        refuse_what_the_own_class_lacks("X", ["it is quantised"], Requested(eplb={}), options)


NUMBERED = OPTIONS | {"ffn_experts": "--more ffn_experts", "full_queue": "--more full_queue"}


def test_a_number_is_read_where_one_is_wanted() -> None:
    assert Requested.read({}, NUMBERED, "our_", "--more").ffn_experts is None
    assert Requested.read({"ffn_experts": 3}, NUMBERED, "our_", "--more").ffn_experts == 3
    assert Requested.read({"ffn_experts": 3.5}, NUMBERED, "our_", "--more").ffn_experts == 3.5


@pytest.mark.parametrize("value", [True, "3", 0, -1, float("nan"), float("inf"), 10**400, None])
def test_what_is_no_number_above_0_is_named(value: Any) -> None:
    complaint = r"our_ffn_experts: .*, wanted a number above 0, or two of them; correct --more"
    for given in (value, [value, 3], [3, value]):
        with pytest.raises(ValueError, match=complaint):
            Requested.read({"ffn_experts": given}, NUMBERED, "our_", "--more")
    with pytest.raises(ValueError, match="in it, each true or false, our_ffn_experts a number above 0"):
        Requested.read(value, NUMBERED, "our_", "--more")
    with pytest.raises(ValueError, match=r"our_full_queue: .*, wanted a whole number above 0; correct --more"):
        Requested.read({"ffn_experts": [3, 4], "full_queue": value}, NUMBERED, "our_", "--more")


def test_two_bounds_follow_the_queue() -> None:
    requested = Requested.read({"ffn_experts": [3, 4.5], "full_queue": 7}, NUMBERED, "our_", "--more")
    assert (requested.ffn_experts, requested.full_queue, requested.follows_queue) == ([3, 4.5], 7, True)
    assert not Requested.read({"ffn_experts": 3}, NUMBERED, "our_", "--more").follows_queue


@pytest.mark.parametrize("value", [[], [3], [3, 4, 5]])
def test_bounds_are_two(value: list[int]) -> None:
    with pytest.raises(ValueError, match=r"our_ffn_experts: .*, wanted a number above 0, or two of them"):
        Requested.read({"ffn_experts": value}, NUMBERED, "our_", "--more")


@pytest.mark.parametrize("given", [{}, {"ffn_experts": 3}])
def test_a_full_queue_without_bounds_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="our_full_queue: it is for two bounds; give our_ffn_experts two numbers, or"):
        Requested.read({**given, "full_queue": 7}, NUMBERED, "our_", "--more")


@pytest.mark.parametrize("name", OPTIONS)
def test_a_request_is_not_lost_where_the_engines_own_class_serves(name: str) -> None:
    refuse_what_the_own_class_lacks("X", ["it is quantised"], Requested(), OPTIONS)
    with pytest.raises(ValueError, match=f"--more {name}: X's own class, which serves here as it is quantised, does"):
        refuse_what_the_own_class_lacks("X", ["it is quantised"], Requested(**{name: True}), OPTIONS)


FP8 = replace(DEFAULT, expert_ffn_hidden_size=256, quantization=Quantization("fp8"))
CHAT = replace(DEFAULT, n_routed_experts=512, zero_expert_num=256, moe_topk=12)


@pytest.mark.parametrize(
    ("config", "dtype", "capability", "ranks", "obstacle"),
    [
        (CHAT, torch.bfloat16, (9, 0), 8, None),
        (CHAT, torch.float32, (10, 0), 1, None),
        (CHAT, torch.bfloat16, None, 1, "no GPU of NVIDIA's, wanted compute capability 9.0 or more"),
        (CHAT, torch.bfloat16, (8, 9), 1, "compute capability 8.9, wanted compute capability 9.0 or more"),
        (CHAT, torch.float16, (9, 0), 1, "dtype torch.float16, wanted torch.bfloat16 or torch.float32"),
        (replace(CHAT, moe_topk=17), torch.bfloat16, (9, 0), 1, "17 of 768 experts for a token, wanted at most 16 of"),
        (replace(CHAT, zero_expert_num=513), torch.bfloat16, (9, 0), 1, "12 of 1025 experts for a token, wanted at"),
        (FP8, torch.bfloat16, (9, 0), 2, None),
        (FP8, torch.bfloat16, (9, 0), 4, "64 rows of an FP8 expert on a rank, wanted a multiple of 128"),
    ],
)
def test_where_kernels_cannot_be_used_is_said_before_a_worker_starts(
    config: LongcatConfig,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    ranks: int,
    obstacle: str | None,
) -> None:
    found = obstacles_to_kernels(config, dtype, capability, ranks)
    assert len(found) == (obstacle is not None)
    assert obstacle is None or found[0].startswith(obstacle)


def test_kernels_need_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("longcat_core.kernels.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "triton", None)
    (obstacle,) = obstacles_to_kernels(CHAT, torch.bfloat16, (9, 0), 1)
    assert obstacle.startswith("Triton cannot be imported")
