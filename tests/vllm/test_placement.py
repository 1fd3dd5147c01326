"""Our option for where experts are in vLLM: settled before any worker starts, once for all ranks."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from longcat_core.parallel.location import COUNTS, PLACES
from longcat_core.weights.audit import CheckpointError
from longcat_vllm import model
from longcat_vllm.moe import ZeroExpertAwareExperts
from longcat_vllm.placement import FIELD, Placed
from tests.cases import CASES, Case

CASE = CASES["default"]
LAYERS, EXPERTS = CASE.config.num_layers, CASE.config.n_routed_experts
IN_ORDER = [*range(EXPERTS)]
REPLICATED = [7, 6, 5, 4, 3, 2, 1, 0, 7, 7]
TWO_RANKS = {"tensor_parallel_size": 2, "enable_expert_parallel": True}


def places_of(directory: Path, content: dict[str, Any], **options: Any) -> Any:
    """What all ranks are told."""
    asked = {"longcat": {"init_expert_location": json.dumps(content)}}
    args = EngineArgs(str(directory), skip_tokenizer_init=True, additional_config=asked, **{**TWO_RANKS, **options})
    hf_config: Any = args.create_engine_config().model_config.hf_config
    return hf_config.longcat_places


def test_ranks_are_told_the_places_of_a_file(checkpoint_of: Callable[[Case], Path]) -> None:
    assert places_of(checkpoint_of(CASE), {PLACES: [REPLICATED] * LAYERS}) == [REPLICATED] * LAYERS


def test_experts_are_placed_by_their_counts(checkpoint_of: Callable[[Case], Path]) -> None:
    """The two that are chosen most often are apart, each of them with three others."""
    for layer in places_of(checkpoint_of(CASE), {COUNTS: [[90, 80, 1, 1, 1, 1, 1, 1]] * LAYERS}):
        assert sorted(layer) == IN_ORDER
        assert (0 in layer[:4]) is (1 in layer[4:])


@pytest.mark.parametrize(
    ("content", "options", "wanted"),
    [
        (
            {PLACES: [IN_ORDER] * LAYERS},
            {"enable_expert_parallel": False},
            "one rank has every expert; give --enable-ex",
        ),
        ({PLACES: [IN_ORDER] * LAYERS}, {"enable_ep_weight_filter": True}, "leave --enable-ep-weight-filter out"),
        ({PLACES: [IN_ORDER] * LAYERS}, {"expert_placement_strategy": "round_robin"}, "leave --expert-placement-str"),
        ({PLACES: [IN_ORDER] * LAYERS}, {"load_format": "sharded_state"}, "where they were when it was saved"),
        ({PLACES: [[*IN_ORDER, 0]] * LAYERS}, {}, "9 places in a layer, wanted a multiple of the 2 ranks that share"),
        ({PLACES: [[*IN_ORDER[:-1], -1]] * LAYERS}, {}, "expert -1 in layer 0, wanted 0 to 7; correct it, or leave"),
        ({COUNTS: [[1, 2]]}, {}, r"\[1, 2\] numbers, wanted \[2, 8\]"),
        ({COUNTS: [[0] * EXPERTS] * LAYERS}, {}, "a layer in which no FFN expert was chosen"),
        ({"counts": []}, {}, f"wanted {PLACES} or {COUNTS} in it"),
    ],
)
def test_what_ranks_would_get_wrong_is_refused(
    content: dict[str, Any], options: dict[str, Any], wanted: str, checkpoint_of: Callable[[Case], Path]
) -> None:
    with pytest.raises(ValueError, match=wanted):
        places_of(checkpoint_of(CASE), content, **options)


def test_an_expert_is_written_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def load(self: RoutedExperts, *given: Any, return_success: bool) -> bool:
        written.append(given[-1])
        return given[-1] >= 5  # what this rank has

    monkeypatch.setattr(RoutedExperts, "weight_loader", load)
    experts: Any = object.__new__(ZeroExpertAwareExperts)
    vars(experts)["_places"] = Placed(REPLICATED, EXPERTS).of_experts
    given = (torch.nn.Parameter(torch.zeros(1)), torch.zeros(1), "w2_weight", "w2")
    assert ZeroExpertAwareExperts.weight_loader(experts, *given, 7, return_success=True)
    assert written == [0, 8, 9]
    assert not ZeroExpertAwareExperts.weight_loader(experts, *given, 6, return_success=True)
    assert written == [0, 8, 9, 1]


def test_weights_are_not_reloaded_where_replicas_would_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """And vLLM is told to put those that it has set aside back."""
    put_back: list[Any] = []
    monkeypatch.setattr(model, "finalize_layerwise_reload", lambda causal, _: put_back.append(causal))
    causal = object.__new__(model.LongcatCausalLM)
    torch.nn.Module.__init__(causal)
    causal.weight = torch.nn.Parameter(torch.empty(2, device="meta"))
    causal.model, causal._model_config = torch.nn.Module(), None
    causal.config = SimpleNamespace(**{FIELD: [REPLICATED]})
    with pytest.raises(CheckpointError, match="cannot be reloaded where a file places experts; restart"):
        causal.load_weights([])
    assert put_back == [causal]


def test_a_zero_expert_has_no_place() -> None:
    placed = Placed(REPLICATED, EXPERTS)
    assert len(placed) == len(REPLICATED)
    assert list(placed.parameters()) == []
    assert placed.state_dict() == {}
    ids = torch.tensor([[7, -1], [7, 3], [-1, 7]], dtype=torch.int32)
    assert placed(ids).tolist() == [[0, -1], [8, 4], [-1, 9]]


def test_vllm_still_gives_an_own_router_nothing_to_balance_with() -> None:
    """If this fails, --enable-eplb may be served."""
    import inspect

    from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

    source = inspect.getsource(FusedMoEFactory)
    assert source.count("eplb_state=eplb_state,") == 1, "which is for the router that it makes itself"
