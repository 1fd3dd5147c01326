"""Our option for where experts are in vLLM: settled before any worker starts, once for all ranks."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.eplb.eplb_state import EplbLayerState, EplbState, compute_logical_maps
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router import base_router
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.v1.worker import cpu_model_runner

from longcat_core.parallel.location import COUNTS, PLACES
from longcat_core.weights.audit import CheckpointError
from longcat_core.weights.blocks import FP8
from longcat_vllm import model, updates
from longcat_vllm.devices.cpu import balancing, patches
from longcat_vllm.devices.cpu.device import Cpu
from longcat_vllm.devices.cpu.experts import CompactedRowsMethod
from longcat_vllm.devices.cpu.fp8 import CompactedFp8RowsMethod
from longcat_vllm.moe import MovableExperts, PrecomputedRouting, ZeroExpertAwareExperts
from longcat_vllm.placement import FIELD, Placed
from longcat_vllm.updates import Update
from tests.cases import CASES, Case
from tests.oracle import assert_greedy_equal, greedy, oracle
from tests.vllm.engine import in_each_rank, serving

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


def test_weights_are_not_reloaded_where_replicas_would_be_written() -> None:
    """And vLLM puts those that it has set aside back."""
    from vllm.model_executor.model_loader import reload

    causal: Any = object.__new__(model.LongcatCausalLM)
    torch.nn.Module.__init__(causal)
    weight = causal.weight = torch.nn.Parameter(torch.ones(2))
    causal.model, causal._vllm_config, causal.update = torch.nn.Module(), SimpleNamespace(model_config=None), Update({})
    causal.config = SimpleNamespace(**{FIELD: [REPLICATED]})
    reload.record_metadata_for_reloading(causal)
    reload.initialize_layerwise_reload(causal)
    with pytest.raises(CheckpointError, match="cannot be reloaded where a file places experts; restart"):
        causal.load_weights([])
    assert causal.weight is weight


def test_weights_are_not_loaded_again_where_experts_move() -> None:
    causal = object.__new__(model.LongcatCausalLM)
    torch.nn.Module.__init__(causal)
    causal.model, causal.expert_weights = torch.nn.Module(), [[torch.zeros(1)]]
    causal.update = updates.Update({})
    with pytest.raises(CheckpointError, match="cannot be loaded again where experts move between ranks; restart"):
        causal.load_weights([])


def test_experts_that_move_are_not_saved() -> None:
    experts: Any = object.__new__(ZeroExpertAwareExperts)
    parallel = SimpleNamespace(enable_eplb=True)
    vars(experts)["moe_config"] = SimpleNamespace(moe_parallel_config=parallel)
    with pytest.raises(RuntimeError, match="a saved state would not say where they are; serve without --enable-eplb"):
        ZeroExpertAwareExperts._save_to_state_dict(experts, {}, "model.layers.0.mlp.experts.", keep_vars=False)


def layer_with(router: PrecomputedRouting, dtype: torch.dtype = torch.float32) -> Any:
    layer: Any = object.__new__(MoERunner)
    torch.nn.Module.__init__(layer)
    layer.router, layer.get_expert_weights = router, lambda: [torch.zeros(4, 6, dtype=dtype)]
    return layer


def test_a_router_that_vllm_does_not_reach_is_an_error() -> None:
    maps = torch.zeros(1, 10, dtype=torch.int32), torch.zeros(1, EXPERTS, 4), torch.ones(1, EXPERTS)
    movable: Any = object.__new__(MovableExperts)
    movable.num_moe_layers, ours = 1, PrecomputedRouting(4, 10, EplbLayerState())
    movable.moe_layers = [layer_with(ours)]
    movable.set_eplb_state(*maps)
    assert ours.eplb_state is not None
    assert ours.eplb_state.expert_load_view is not None
    movable.moe_layers = [layer_with(PrecomputedRouting(4, 10))]
    with pytest.raises(RuntimeError, match="the router of layer 0 of 1 has no state of --enable-eplb"):
        movable.set_eplb_state(*maps)


def test_experts_that_cannot_move_through_one_buffer_are_an_error() -> None:
    """As a recipe that has some layers in bf16 makes them."""
    movable: Any = object.__new__(MovableExperts)
    movable.num_moe_layers, dtypes = 2, (torch.uint8, torch.bfloat16)
    movable.moe_layers = [layer_with(PrecomputedRouting(4, 10, EplbLayerState()), dtype) for dtype in dtypes]
    wanted = r"the experts of layer 1 of 2 are \[4, 6\] of bfloat16, wanted \[4, 6\] of uint8 as in layer 0"
    with pytest.raises(RuntimeError, match=wanted):
        movable.set_eplb_state(torch.zeros(2, 10), torch.zeros(2, EXPERTS, 4), torch.ones(2, EXPERTS))


@pytest.mark.parametrize("other", ["fp8 in float8_e4m3fn", "compiled in bfloat16"])
def test_experts_that_ranks_have_packed_for_different_kernels_are_an_error(
    other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(found: list[set[str]], here: set[str], group: None) -> None:
        found[:] = [here, {other}]

    monkeypatch.setattr(balancing, "get_ep_group", lambda: SimpleNamespace(world_size=2, cpu_group=None))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    layer = SimpleNamespace(cpu_kernel="fp8", w13_weight=torch.zeros(1, dtype=FP8))
    if other == "fp8 in float8_e4m3fn":
        balancing.require_one_layout([layer])
    else:
        with pytest.raises(ValueError, match=f"several kernels, {other}, fp8 in float8_e4m3fn, wanted one"):
            balancing.require_one_layout([layer])


@pytest.mark.parametrize("is_counted", [False, True])
def test_rows_of_ffn_experts_are_counted_by_place_and_zero_experts_stay(is_counted: bool) -> None:
    state = EplbLayerState(
        expert_load_view=torch.ones(len(REPLICATED), dtype=torch.int32),
        logical_to_physical_map=compute_logical_maps(torch.tensor(REPLICATED), EXPERTS)[0],
        logical_replica_count=compute_logical_maps(torch.tensor(REPLICATED), EXPERTS)[1],
        should_record_tensor=torch.tensor(is_counted),
        num_unpadded_tokens_tensors=[torch.tensor(2, dtype=torch.int32)],
    )
    ids = torch.tensor([[7, -1], [7, 3], [-1, 7]], dtype=torch.int32)
    assert Cpu().balanced(ids, state).tolist() == [[0, -1], [8, 4], [-1, 9]]
    counted = [1, 0, 0, 0, 1, 0, 0, 0, 1, 0] if is_counted else [0] * 10
    assert (state.expert_load_view - 1).tolist() == counted, "of two tokens; the third pads the step"


def test_scales_of_experts_move_with_their_weights() -> None:
    experts: Any = object.__new__(ZeroExpertAwareExperts)
    torch.nn.Module.__init__(experts)
    experts.local_num_experts = 4
    for name, dtype in (("w13_weight", FP8), ("w2_weight", FP8), ("w13_scale", torch.float32), ("w2_scale", None)):
        experts.register_parameter(name, torch.nn.Parameter(torch.zeros(4, 3, 2, dtype=dtype), requires_grad=False))
    found = experts.get_expert_weights()
    assert [list(weight.shape) for weight in found] == [[4, 6]] * 4
    assert [weight.data_ptr() for weight in found] == [weight.data_ptr() for weight in experts.parameters()]
    assert FP8 not in {weight.dtype for weight in found}, "which gloo does not gather"
    assert all(method.supports_eplb.fget(None) for method in (CompactedRowsMethod, CompactedFp8RowsMethod))


@pytest.mark.parametrize(
    ("asked", "options", "wanted"),
    [
        ({"policy": "ours"}, {}, "policy in it, wanted num_redundant_experts or window_size or"),
        ({"window_size": 0}, {}, "greater than 0"),
        ({"num_redundant_experts": 1}, {}, "8 FFN experts and 1 redundant ones, wanted a multiple of the 2 ranks"),
        ({}, {"enable_expert_parallel": False}, "one rank has every expert; give --enable-expert-parallel"),
        ({}, {"worker_cls": "tests.Worker"}, "leave --worker-cls out"),
        ({}, {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}, "leave them out, or leave it out"),
        ({}, {"load_format": "sharded_state"}, "where they were when it was saved"),
        ({}, {"pipeline_parallel_size": 2}, "moves experts of the last stage only"),
        ({}, {"runner": "pooling"}, "moves no experts where nothing is sampled; leave --runner out"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has vLLM's own option")
def test_moves_that_a_cpu_would_get_wrong_are_refused(
    asked: dict[str, Any], options: dict[str, Any], wanted: str, checkpoint_of: Callable[[Case], Path]
) -> None:
    given = {**TWO_RANKS, **moving(**{"num_redundant_experts": 0} | asked), **options}
    args = EngineArgs(str(checkpoint_of(CASE)), skip_tokenizer_init=True, **given)
    with pytest.raises(ValueError, match=wanted):
        args.create_engine_config()


def test_a_zero_expert_has_no_place() -> None:
    placed = Placed(REPLICATED, EXPERTS)
    assert len(placed) == len(REPLICATED)
    assert list(placed.parameters()) == []
    assert placed.state_dict() == {}
    ids = torch.tensor([[7, -1], [7, 3], [-1, 7]], dtype=torch.int32)
    assert placed(ids).tolist() == [[0, -1], [8, 4], [-1, 9]]


def note_moves(noted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Append to a file how many places have another expert than before, and by how many rows that was decided."""
    rearrange = EplbState.rearrange

    def noting(self: EplbState, *args: Any, **kwargs: Any) -> None:
        (state,) = self.model_states.values()
        before, rows = state.physical_to_logical_map.clone(), int(state.expert_load_window.sum())
        rearrange(self, *args, **kwargs)
        with noted.open("a") as file:
            file.write(f"{int((before != state.physical_to_logical_map).sum())},{rows} ")

    monkeypatch.setattr(EplbState, "rearrange", noting)


def moving(**options: Any) -> dict[str, Any]:
    """Engine arguments: experts move between ranks, every five steps."""
    asked = {"num_redundant_experts": 2, "step_interval": 5, "window_size": 5} | options
    return {"additional_config": {"longcat": {"eplb": asked}}}


def test_experts_that_move_while_64_requests_run_change_no_token(
    checkpoint_of: Callable[[Case], Path], tmp_path: Path
) -> None:
    noted, new_tokens = tmp_path / "moves", 16
    prompts = [CASE.prompts(1, 1 + n % 20, seed=n)[0] for n in range(64)]
    with serving(
        checkpoint_of(CASE),
        tensor_parallel=2,
        expert_parallel=True,
        **moving(),
        **in_each_rank(partial(note_moves, noted)),
    ) as served:
        answers = served.greedy(prompts, new_tokens)
    moves = [tuple(map(int, each.split(","))) for each in noted.read_text().split()]
    assert sum(places > 0 and rows > 0 for places, rows in moves) >= 4, "twice on both ranks"
    truth = oracle(CASE.config, CASE.published())
    for prompt, tokens in zip(prompts, answers, strict=True):
        assert_greedy_equal(tokens, greedy(truth, prompt, new_tokens))


# -- what is ours is for this, and still so ----------------------------------------------------------


def test_vllm_still_gives_an_own_router_nothing_to_balance_with() -> None:
    """If this fails, `PrecomputedRouting` need not be given it."""
    source = inspect.getsource(FusedMoEFactory)
    assert source.count("eplb_state=eplb_state,") == 1, "which is for the router that it makes itself"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has a kernel for it")
def test_vllms_router_still_places_nothing_on_a_cpu() -> None:
    """If this fails, `Cpu.balanced` would place ids that are places already."""
    ids = torch.tensor([[0, 1]])
    unread: Any = None
    assert base_router.eplb_map_to_physical_and_record(ids, *[unread] * 4) is ids


def test_vllms_runner_of_a_cpu_still_has_no_state_of_its_experts() -> None:
    """If this fails, `BalancingWorker` may have become unnecessary."""
    assert "eplb" not in inspect.getsource(cpu_model_runner)


def test_vllms_event_on_a_cpu_still_cannot_tell_the_time() -> None:
    """If this fails, the row "time of moving experts" may have become unnecessary."""
    assert "elapsed_time" not in (Path(cpu_model_runner.__file__).parent / "cpu" / "shm.py").read_text()
    patches.time_events()
    assert patches.what_times_events() == patches.__name__
    from vllm.v1.worker.cpu.shm import _EventPlaceholder

    event: Any = _EventPlaceholder()
    assert math.isnan(event.elapsed_time(event))
