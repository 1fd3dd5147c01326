"""SGLang's options for where experts are: checked beforehand, and choices of zero experts have no place."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.eplb import eplb_algorithms, expert_location
from sglang.srt.eplb.expert_distribution import (
    _ExpertDistributionRecorderReal,
    _SelectExpertsSinglePassGatherer,
    _StatAccumulator,
)
from sglang.srt.eplb.expert_location import ExpertLocationMetadata
from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo, topk_ids_logical_to_physical
from sglang.srt.eplb.expert_location_updater import ExpertLocationUpdater
from sglang.srt.runtime_context import get_context

from longcat_core.parallel.location import COUNTS, PLACES
from longcat_core.parallel.placement import place
from longcat_sglang import placement
from longcat_sglang.devices.cpu import patches
from tests.cases import CASES, DEFAULT, Case
from tests.oracle import assert_greedy_equal, greedy, oracle
from tests.sglang.engine import in_each_rank, serving

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


def test_scales_of_experts_move_with_their_weights() -> None:
    unpacked: list[Any] = []
    device: Any = SimpleNamespace(restore_experts=unpacked.append)
    experts = torch.nn.Module()
    for name in ("w13_weight", "w2_weight", "w13_weight_scale_inv", "w2_weight_scale_inv"):
        experts.register_parameter(name, torch.nn.Parameter(torch.zeros(4, 1)))
    layers = [SimpleNamespace(mlp=SimpleNamespace(experts=experts))] * 2
    found = placement.weights_of(layers, device)
    assert unpacked == [experts, experts]
    assert {number: len(weights) for number, weights in found.items()} == {0: 4, 1: 4}


MODEL_CONFIG: Any = SimpleNamespace(hf_config=SimpleNamespace(longcat=DEFAULT))


def policy(
    algorithm: str, rank: int, ranks: int, counts: Any, monkeypatch: pytest.MonkeyPatch, nodes: int = 1
) -> list[list[int]]:
    """The places that one of some ranks gives, of other ranks' layers zeros."""
    options: dict[str, Any] = {"tp_size": 2, "ep_size": 2, "device": "cpu", "ep_num_redundant_experts": 2}
    options["nnodes"] = nodes
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: ranks)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda _: None)
    monkeypatch.setattr(ExpertLocationMetadata, "init_by_mapping", lambda config, places: (config, places.tolist()))
    with get_context().override_server_args(eplb_algorithm=algorithm, **options):
        config, places = placement.place_by_load(lambda *given: given, MODEL_CONFIG, counts)
    assert config is MODEL_CONFIG
    found: list[list[int]] = places
    return found


BUSY_TOGETHER = [[[90, 10, 90, 10, 50, 50, 50, 50]] * LAYERS, [[10, 90, 10, 90, 50, 50, 50, 50]] * LAYERS]
"""Counts of two steps."""


def test_ours_is_the_policy_unless_another_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    places = policy("auto", 0, 1, BUSY_TOGETHER, monkeypatch)
    assert places == place(np.array(BUSY_TOGETHER, dtype=float), 2, 2, ranks_a_node=2).physical_to_logical.tolist()
    assert policy("deepseek", 0, 1, BUSY_TOGETHER, monkeypatch) is BUSY_TOGETHER


@pytest.mark.parametrize("nodes", [2, 3, 4])
def test_ranks_of_a_node_are_told_from_others_if_each_node_has_as_many(
    nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two ranks, on more nodes, one at least has its experts spread over several."""
    told: list[int] = []
    place_now = placement.place_while_serving

    def noting(*args: Any, ranks_a_node: int, **kwargs: Any) -> Any:
        told.append(ranks_a_node)
        return place_now(*args, ranks_a_node=ranks_a_node, **kwargs)

    monkeypatch.setattr(placement, "place_while_serving", noting)
    policy("auto", 0, 1, BUSY_TOGETHER, monkeypatch, nodes)
    assert {*told} == {1 if nodes == 2 else 2}


def test_ranks_place_a_share_of_the_layers_each(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = policy("auto", 0, 1, BUSY_TOGETHER, monkeypatch)
    parts = [policy("auto", rank, 3, torch.tensor(BUSY_TOGETHER), monkeypatch) for rank in range(3)]
    assert torch.tensor(parts).sum(dim=0).tolist() == whole
    assert [[any(layer) for layer in part] for part in parts] == [[True, False], [False, True], [False, False]]


def test_experts_stay_where_none_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [BUSY_TOGETHER[0][0], [0] * EXPERTS]
    assert policy("auto", 0, 1, counts, monkeypatch)[1] == [*IN_ORDER, 0, 1]
    now = SimpleNamespace(physical_to_logical_map_cpu=torch.tensor([REPLICATED] * LAYERS))
    monkeypatch.setattr(expert_location, "get_global_expert_location_metadata", lambda: now)
    assert policy("auto", 0, 1, counts, monkeypatch)[1] == REPLICATED


def note_places(noted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Append to a file where experts were and where they are now, and have no policy but ours."""
    update = ExpertLocationMetadata.update

    def noting(self: ExpertLocationMetadata, other: ExpertLocationMetadata, update_layer_ids: list[int]) -> None:
        before = self.physical_to_logical_map.tolist()
        update(self, other, update_layer_ids=update_layer_ids)
        with noted.open("a") as file:
            file.write(json.dumps([before, self.physical_to_logical_map.tolist()]) + "\n")

    monkeypatch.setattr(ExpertLocationMetadata, "update", noting)
    monkeypatch.delattr(eplb_algorithms, "rebalance_experts")


def test_experts_that_move_while_64_requests_run_change_no_token(
    checkpoint_of: Callable[[Case], Path], tmp_path: Path
) -> None:
    case, noted, new_tokens = CASES["default"], tmp_path / "places", 16
    prompts = [case.prompts(1, 1 + n % 20, seed=n)[0] for n in range(64)]
    balancing = {"enable_eplb": True, "eplb_rebalance_num_iterations": 5, "expert_distribution_recorder_buffer_size": 5}
    with serving(
        checkpoint_of(case),
        tensor_parallel=2,
        expert_parallel=True,
        init_expert_location=json.dumps({COUNTS: BUSY_TOGETHER}),
        ep_num_redundant_experts=2,
        **balancing,
        **in_each_rank(partial(note_places, noted)),
    ) as served:
        answers = served.greedy(prompts, new_tokens)
    updates = Counter(noted.read_text().splitlines())
    assert set(updates.values()) == {2}, "alike on both ranks"
    moves = [*map(json.loads, updates)]
    assert moves[0][0] == place(np.array(BUSY_TOGETHER, dtype=float), 2, 2).physical_to_logical.tolist()
    assert sum(before != after for before, after in moves) >= 2, "experts moved twice"
    truth = oracle(case.config, case.published())
    for prompt, tokens in zip(prompts, answers, strict=True):
        assert_greedy_equal(tokens, greedy(truth, prompt, new_tokens))


def test_sglangs_recorder_counts_rows_of_ffn_experts_by_place() -> None:
    gatherer: Any = object.__new__(_SelectExpertsSinglePassGatherer)
    gatherer._data = torch.zeros(LAYERS, len(REPLICATED), dtype=torch.int)
    gatherer._expert_location_metadata = SimpleNamespace(num_physical_experts=len(REPLICATED))
    with placed(REPLICATED, "dynamic"):
        places = placement.place_ids(torch.tensor([[0, -1, 7], [7, 3, -1]], dtype=torch.int32), 1)
    gatherer.on_select_experts(1, places)
    assert gatherer._data.tolist() == [[0] * 10, [1, 0, 0, 0, 1, 0, 0, 1, 1, 0]]


def problems(
    given: str = placement.IN_ORDER,
    redundant: int = 0,
    ranks: int = 2,
    load_format: str = "auto",
    balances: bool = False,
    all_to_all: str = "none",
    algorithm: str = "auto",
) -> list[str]:
    settings = SimpleNamespace(ep_num_redundant_experts=redundant, ep_size=ranks, tp_size=4, load_format=load_format)
    settings.init_expert_location, settings.enable_eplb, settings.moe_a2a_backend = given, balances, all_to_all
    settings.eplb_algorithm = algorithm
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


def test_an_all_to_all_has_experts_on_all_ranks() -> None:
    """SGLang sets --ep-size to that later."""
    assert problems(of(IN_ORDER), ranks=1, all_to_all="deepep") == []


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({"ranks": 3}, "ep_size: 3, wanted a divisor of the 8 FFN experts; give --ep-size one"),
        ({"redundant": 1}, "ep_size: 2, wanted a divisor of the 9 FFN experts, of which 1 are redundant; give"),
        ({"balances": True, "ranks": 1}, "ep_size: 1, wanted more for --enable-eplb, as one rank has every expert"),
        (
            {"balances": True, "algorithm": "ours"},
            "eplb_algorithm: 'ours', wanted one of auto, deepseek, deepseek_vec, el",
        ),
        (
            {"balances": True, "redundant": 10},
            "ep_num_redundant_experts: 10, wanted at most 8, with which every rank ha",
        ),
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


# -- what the patches are for is still so ------------------------------------------------------------


@pytest.mark.parametrize("algorithm", sorted({"auto", *(each.name for each in eplb_algorithms.EplbAlgorithm)}))
def test_sglangs_algorithms_are_served_or_refused(algorithm: str) -> None:
    for_groups = algorithm.endswith("_hierarchical")
    assert bool(problems(balances=True, algorithm=algorithm)) is for_groups
    assert problems(algorithm=algorithm) == [], "which nothing asks"
    if for_groups and algorithm.startswith("deepseek"):
        chosen = eplb_algorithms.EplbAlgorithm[algorithm]
        with pytest.raises(TypeError, match="NoneType"):
            eplb_algorithms.rebalance_experts(torch.ones(1, LAYERS, EXPERTS), EXPERTS, EXPERTS // 2, None, 1, chosen)


def test_sglangs_recorder_still_asks_a_cpu_whether_it_captures_a_graph() -> None:
    """If this fails, the row "recorded choices" may have become unnecessary."""
    recorder: Any = object.__new__(_ExpertDistributionRecorderReal)
    recorder._recording = recorder._disable_all = False
    original = inspect.unwrap(_ExpertDistributionRecorderReal._on_hook)
    with pytest.raises(AttributeError, match="is_current_stream_capturing"):
        original(recorder, "on_select_experts", topk_ids=torch.tensor([[0]]))
    patches.note_choices_while_recording(original, recorder, "on_select_experts", topk_ids=torch.tensor([[0]]))


def test_sglangs_counts_still_empty_a_cache_that_a_cpu_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the row "dump of recorded choices" may have become unnecessary."""
    counts: Any = object.__new__(_StatAccumulator)
    counts._first_dump, counts._rank = True, 0
    counts._global_physical_count_of_buffered_step = SimpleNamespace(get_all=lambda: torch.zeros(3, 1, 2))
    counts._expert_location_metadata = SimpleNamespace(
        num_layers=1, num_logical_experts=2, physical_to_logical_map=torch.tensor([[1, 0]])
    )
    counts._get_global_average_utilization_rate = lambda: None
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    original = inspect.unwrap(_StatAccumulator.dump)
    with pytest.raises(AttributeError, match="empty_cache"):
        original(counts, "object")
    counts._first_dump = True
    assert patches.dump_counts(original, counts, "object")["logical_count"].shape == (3, 1, 2)


def test_sglangs_first_move_still_empties_a_cache_that_a_cpu_does_not_have() -> None:
    """If this fails, the row "moves of experts" may have become unnecessary."""
    updater, original = ExpertLocationUpdater(), inspect.unwrap(ExpertLocationUpdater.update)
    unused: Any = None
    with pytest.raises(AttributeError, match="empty_cache"):
        original(updater, unused, unused, [], 1, 0)
    updater = ExpertLocationUpdater()
    moved: list[bool] = []
    patches.move_experts(lambda self: moved.append(self._first_execution), updater)
    assert moved == [False]
