"""SGLang's options for where experts are: checked beforehand, and choices of zero experts have no place."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.eplb import expert_location
from sglang.srt.eplb.expert_distribution import _SelectExpertsSinglePassGatherer
from sglang.srt.eplb.expert_location import ExpertLocationMetadata
from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo, topk_ids_logical_to_physical
from sglang.srt.runtime_context import get_context

from longcat_core.parallel.location import COUNTS, PLACES
from longcat_sglang import placement
from tests.cases import DEFAULT

LAYERS, EXPERTS = DEFAULT.num_layers, DEFAULT.n_routed_experts
IN_ORDER = [*range(EXPERTS)]
REPLICATED = [7, 6, 5, 4, 3, 2, 1, 0, 7, 7]


@contextmanager
def placed(places: list[int], algorithm: str) -> Iterator[None]:
    """A rank's process of SGLang, all layers with experts in these places."""
    options: dict[str, Any] = {"tp_size": 2, "ep_size": 2, "device": "cpu", "ep_dispatch_algorithm": algorithm}
    with pytest.MonkeyPatch.context() as patch, get_context().override_server_args(**options):
        of_layers = torch.tensor([places] * LAYERS)
        of_experts = expert_location._compute_logical_to_all_physical_map(of_layers, EXPERTS, 2, 0)
        metadata = ExpertLocationMetadata._init_raw(2, of_layers, of_experts, moe_ep_rank=0)
        for module in ("expert_location", "expert_location_dispatch"):
            name = f"sglang.srt.eplb.{module}.get_global_expert_location_metadata"
            patch.setattr(name, lambda: metadata)
        yield


@pytest.mark.parametrize("algorithm", ["dynamic", "static"])
def test_a_zero_expert_has_no_place(algorithm: str) -> None:
    ids = torch.tensor([[0, -1, 7], [7, 3, -1], [-1, -1, 7]], dtype=torch.int32)
    with placed(REPLICATED, algorithm):
        found = placement.place_ids(ids, 1)
    assert found.dtype == torch.int32
    assert torch.equal(found < 0, ids < 0)
    assert torch.equal(torch.tensor([*REPLICATED, -1], dtype=torch.int32)[found.long()], ids)


def test_sglang_still_takes_a_zero_expert_for_the_last_expert() -> None:
    """If this fails, `placement.place_ids` may have become unnecessary."""
    with placed(REPLICATED, "dynamic"):
        info = ExpertLocationDispatchInfo.init_new(1)
        assert topk_ids_logical_to_physical(torch.tensor([[-1, 0]]), info).tolist() == [[0, 7]]


def test_without_an_algorithm_experts_are_where_their_numbers_say() -> None:
    ids = torch.tensor([[0, -1, 7]], dtype=torch.int32)
    with get_context().override_server_args(device="cpu"):
        assert placement.place_ids(ids, 1) is ids
        assert placement.num_places(DEFAULT) == EXPERTS
    with get_context().override_server_args(device="cpu", ep_num_redundant_experts=2):
        assert placement.num_places(DEFAULT) == EXPERTS + 2


def test_sglangs_recorder_counts_rows_of_ffn_experts_by_place() -> None:
    gatherer: Any = object.__new__(_SelectExpertsSinglePassGatherer)
    gatherer._data = torch.zeros(LAYERS, len(REPLICATED), dtype=torch.int)
    gatherer._expert_location_metadata = SimpleNamespace(num_physical_experts=len(REPLICATED))
    with placed(REPLICATED, "dynamic"):
        places = placement.place_ids(torch.tensor([[0, -1, 7], [7, 3, -1]], dtype=torch.int32), 1)
    gatherer.on_select_experts(1, places)
    assert gatherer._data.tolist() == [[0] * 10, [1, 0, 0, 0, 1, 0, 0, 1, 1, 0]]


def problems(
    given: str = placement.IN_ORDER, redundant: int = 0, ranks: int = 2, load_format: str = "auto"
) -> list[str]:
    settings = SimpleNamespace(ep_num_redundant_experts=redundant, ep_size=ranks, load_format=load_format)
    settings.init_expert_location = given
    return placement.problems(settings, DEFAULT)


def of(places: list[int]) -> str:
    return json.dumps({PLACES: [places] * LAYERS})


@pytest.mark.parametrize(
    ("given", "redundant"),
    [
        (placement.IN_ORDER, 0),
        (placement.IN_ORDER, 2),
        (of(IN_ORDER), 0),
        (of(REPLICATED), 2),
        (json.dumps({COUNTS: [[1] * EXPERTS] * LAYERS}), 2),
        (json.dumps({COUNTS: [[[1] * EXPERTS] * LAYERS] * 3}), 2),
    ],
)
def test_what_fits_the_model_is_served(given: str, redundant: int) -> None:
    assert problems(given, redundant) == []


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({"ranks": 3}, "ep_size: 3, wanted a divisor of the 8 FFN experts; give --ep-size one"),
        ({"redundant": 1}, "ep_size: 2, wanted a divisor of the 9 FFN experts, of which 1 are redundant; give"),
        ({"redundant": 2, "ranks": 1}, "leave --ep-num-redundant-experts out"),
        ({"given": of(IN_ORDER), "ranks": 1}, "ep_size: 1, wanted more for --init-expert-location, as one rank has"),
        ({"given": of(IN_ORDER), "redundant": 2}, "8 places in a layer, wanted 10, for 8 FFN experts and --ep-num-re"),
        ({"given": of([*IN_ORDER[:-1], -1])}, "expert -1 in layer 0, wanted 0 to 7; correct it, or leave --init-exp"),
        ({"given": json.dumps({COUNTS: [[1, 2]]})}, r"\[1, 2\] numbers, wanted \[2, 8\]"),
        ({"given": of(IN_ORDER), "load_format": "sharded_state"}, "experts where they were when it was saved"),
        ({"given": "nowhere.json"}, "init_expert_location: nowhere.json: .*No such file"),
    ],
)
def test_what_sglang_would_get_wrong_or_fail_over_is_refused(asked: dict[str, Any], wanted: str) -> None:
    (problem,) = problems(**asked)
    assert re.search(wanted, problem)
