"""A layer's experts beside its dense path: the order of the layer's operations, and what they may read when."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture
from vllm.config import CUDAGraphMode
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, direct_register_custom_op
from vllm.v1.worker import gpu_worker, workspace

from longcat_core.layers.routing import Routing
from longcat_vllm import deployment, moe
from longcat_vllm.devices.branch import Branch
from longcat_vllm.devices.cpu.device import Cpu
from longcat_vllm.devices.cuda import overlap
from longcat_vllm.devices.cuda.device import WORKER, Cuda
from longcat_vllm.devices.cuda.overlap import LANE, SecondStream
from longcat_vllm.devices.cuda.worker import OverlapWorker
from tests.cases import Case
from tests.engines.test_scheduling import CASE, assert_true
from tests.overlap import DENSE, FORK, JOIN, MAIN, SIDE
from tests.threads import threads
from tests.vllm.engine import AS_THE_STOCK_COMMAND, serving
from tests.vllm.noted_layer import (
    LaneRecorder,
    a_layer,
    all_problems,
    runner_of,
    stand_in_for_streams,
    the_context,
)

X = torch.ones(3, 4)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> LaneRecorder:
    recorder = LaneRecorder()
    stand_in_for_streams(recorder, monkeypatch)
    return recorder


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A breakable graph is being captured."""
    monkeypatch.setattr(BreakableCUDAGraphCapture._tls, "active", object(), raising=False)


@pytest.mark.parametrize("mode", [CUDAGraphMode.NONE, CUDAGraphMode.FULL])
def test_the_experts_run_beside_the_dense_path_and_sums_are_made_on_one_stream(
    mode: CUDAGraphMode, recorder: LaneRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where vLLM's second model runner captures a whole step, of which it says that it is in no graph."""
    a_layer(recorder, mode, monkeypatch)(X, X, X, X)
    noted = recorder.noted
    assert all_problems(recorder) == []
    names = [name for _, name in noted]
    beside = noted[names.index(FORK) + 1 : names.index(JOIN)]
    assert [name for stream, name in beside if stream == SIDE] == ["experts"]
    assert [name for stream, name in beside if stream == MAIN] == DENSE
    assert noted[-1] == (MAIN, "final_sum")


def assert_in_a_row(recorder: LaneRecorder) -> None:
    assert all_problems(recorder) == []
    assert {stream for stream, _ in recorder.noted} == {MAIN}
    names = [name for _, name in recorder.noted]
    assert not {FORK, JOIN} & set(names)
    assert names.index("experts") < names.index("dense_ffn_0")
    assert recorder.lanes["experts"] == LANE, "as large as it was while memory was measured"


def test_in_a_graph_in_pieces_the_experts_come_first(recorder: LaneRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    a_layer(recorder, CUDAGraphMode.PIECEWISE, monkeypatch)(X, X, X, X)
    assert_in_a_row(recorder)


@pytest.mark.parametrize("mode", [CUDAGraphMode.NONE, CUDAGraphMode.FULL])
@pytest.mark.usefixtures("in_pieces")
def test_in_a_breakable_graph_too(mode: CUDAGraphMode, recorder: LaneRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    a_layer(recorder, mode, monkeypatch)(X, X, X, X)
    assert_in_a_row(recorder)


def no_join(recorder: LaneRecorder, layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.mlp.branch.join = lambda: None


def no_fork(recorder: LaneRecorder, layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.mlp.branch.stream.wait_stream = lambda other: None


def a_sum_in_the_branch(recorder: LaneRecorder, layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.mlp.branch.experts = runner_of(lambda rows: recorder.sum(recorder.note("experts", rows.clone())))


def one_lane(recorder: LaneRecorder, layer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(overlap, "use_workspace_lane", nullcontext)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (no_join, "final_sum in 1 reads experts, which is not done"),
        (no_fork, "experts in 0 reads router, which is not done"),
        (a_sum_in_the_branch, "experts_sum on the second stream"),
        (one_lane, "experts in the scratch memory of dense_ffn_0"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_in_the_order_is_found(
    fault: Callable[..., None], found: str, recorder: LaneRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = a_layer(recorder, CUDAGraphMode.NONE, monkeypatch)
    fault(recorder, layer, monkeypatch)
    layer(X, X, X, X)
    assert any(problem.startswith(found) for problem in all_problems(recorder))


class Memory:
    """Of a tensor, without keeping it from being given to others."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._place = tensor.storage_offset(), tensor.shape, tensor.stride()
        self.was = tensor.clone()

    def now(self) -> Tensor | None:
        """What is there, None if it was given back."""
        storage: Any = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        return None if storage is None else self.was.new_empty(0).set_(storage, *self._place)


class Late(SecondStream):
    """The latest that a second stream can be: it computes at the join, and what it reads has to be there until then."""

    wrong: list[str]
    noted: list[str]

    def fork(self, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self.noted.append(FORK)
        self.packed = moe.PrecomputedRouting.pack(weights, ids)
        self.read = Memory(hidden_states)
        made = torch.full_like(hidden_states, torch.nan)
        self.made = Memory(made)
        return made

    def join(self) -> None:
        self.noted.append(JOIN)
        if (now := self.read.now()) is None:
            self.wrong.append("given back")
        elif not torch.equal(now, self.read.was):
            self.wrong.append("written over")
        made = self.made.now()
        assert made is not None, "the join has it"
        made.copy_(self.experts(self.read.was, self.packed))


_LIBRARY = torch.library.Library("longcat_test", "FRAGMENT")


def _dense(rows: Tensor, weight: Tensor, name: LayerNameType) -> Tensor:
    cast(Late, overlap._of(name)).noted.append("dense")
    return rows @ weight


def _end_without_inputs(computed: Tensor, between: Tensor, name: LayerNameType) -> Tensor:
    return overlap._end(computed, computed, between, name)


def _like_the_first(first: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(first)


direct_register_custom_op("dense", _dense, [], _like_the_first, _LIBRARY)
direct_register_custom_op("end_without_inputs", _end_without_inputs, [], _like_the_first, _LIBRARY)


class WithoutInputs(Late):
    def end(self, computed: Tensor, hidden_states: Tensor, routing: Routing, between: Tensor) -> Tensor:
        name: Any = _encode_layer_name(self.name)
        return torch.ops.longcat_test.end_without_inputs(computed, between, name)


def all_of_them(rows: Tensor) -> Tensor:
    return rows


def a_part(rows: Tensor) -> Tensor:
    return rows[:17]


def a_padded_part(rows: Tensor) -> Tensor:
    return nn.functional.pad(rows, (0, 0, 0, 1))[17:]


def compiled(
    kind: type[Late], monkeypatch: pytest.MonkeyPatch, share: Callable[[Tensor], Tensor] = all_of_them, count: int = 1
) -> Late:
    """Run what torch.compile makes of a path beside a branch. Its result has to be that of the path in a row.

    share: of the tokens that the branch is to have, as where ranks with the same tokens have a share of them each.
    count: of threads that inductor makes its loops for, on which it depends what stands where.
    """
    the_context(CUDAGraphMode.NONE, monkeypatch)
    monkeypatch.setattr(overlap, "second_stream", lambda: None)
    monkeypatch.setattr(Late, "wrong", [], raising=False)
    monkeypatch.setattr(Late, "noted", [], raising=False)
    torch.manual_seed(0)
    router, experts, *dense = (torch.randn(64, 64) / 8 for _ in range(6))
    branch = kind(runner_of(lambda rows: rows @ experts))

    def path(rows: Tensor, branch: Branch, kept: Late) -> Tensor:
        hidden_states = nn.functional.rms_norm(rows, (64,)) * 1.5
        ours = share(hidden_states)
        weights, ids = (ours @ router).softmax(-1).topk(2)
        routing = Routing(ids.int(), weights * 2, weights.sum(-1))
        begun = branch.begin(ours, routing, hidden_states)
        between, name = hidden_states, _encode_layer_name(kept.name)
        for weight in dense:
            between = torch.relu(torch.sin(between) + torch.cos(torch.ops.longcat_test.dense(between, weight, name)))
        computed = branch.compute(begun, between)
        return branch.end(computed, ours, routing, between) + share(between)

    rows = torch.randn(33, 64)
    torch.compiler.reset()
    with torch.inference_mode(), threads(count):
        exact = path(rows, moe.Whole(branch.experts), branch)
        branch.noted.clear()
        found = torch.compile(path, fullgraph=True, dynamic=False)(rows, branch, branch)
    torch.testing.assert_close(found, exact)
    return branch


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("share", [all_of_them, a_part, a_padded_part])
def test_a_compiled_path_keeps_its_place_and_its_memory(
    share: Callable[[Tensor], Tensor], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch = compiled(Late, monkeypatch, share, count)
    assert branch.wrong == []
    assert branch.noted == [FORK, *["dense"] * 4, JOIN]


def test_a_join_that_does_not_take_what_is_read_leaves_its_memory_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled(WithoutInputs, monkeypatch).wrong != []


def test_the_fork_is_said_to_write_what_is_read_beside_it() -> None:
    """An operator that writes nothing may be moved: with some settings inductor moved the fork to the join."""
    arguments = torch.ops.longcat.branch_begin.default._schema.arguments
    written = [each.name for each in arguments if each.alias_info is not None and each.alias_info.is_write]
    assert written == ["hidden_states", "more"]


def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Late, "wrong", [], raising=False)
    monkeypatch.setattr(Late, "noted", [], raising=False)
    monkeypatch.setattr(overlap, "second_stream", lambda: None)
    monkeypatch.setattr(Cpu, "branch", lambda self, experts, parallel_config: Late(experts))


@pytest.mark.parametrize("options", [{}, AS_THE_STOCK_COMMAND], ids=["eager", "compiled"])
def test_the_experts_may_run_as_late_as_the_layers_end(
    options: dict[str, Any], checkpoint_of: Callable[[Case], Path]
) -> None:
    """Nothing reads them before, and the dense path leaves alone what they read."""
    found: list[tuple[list[str], list[str]]] = []

    def broken(monkeypatch: pytest.MonkeyPatch) -> None:
        late(monkeypatch)
        found.append((Late.wrong, Late.noted))

    with serving(checkpoint_of(CASE), broken=broken, **options) as served:
        assert_true(served)
    ((wrong, noted),) = found
    assert wrong == []
    assert noted == [FORK, JOIN] * (len(noted) // 2) != []


def test_the_worker_has_a_lane_of_scratch_memory_for_the_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given by vLLM's worker before the model runner is made, and later by nobody."""
    monkeypatch.setattr(gpu_worker.Worker, "_make_model_runner", lambda self: workspace.current_workspace_manager())
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    monkeypatch.setattr(workspace, "_manager", None)
    workspace.init_workspace_manager(torch.device("cpu"), 1, 1)
    worker = object.__new__(OverlapWorker)
    worker.device = torch.device("cpu")
    monkeypatch.setattr(worker, "_maybe_get_memory_pool_context", lambda tag: nullcontext())
    manager = worker._make_model_runner()
    places = set()
    for lane in range(LANE + 1):
        with workspace.use_workspace_lane(lane):
            places.add(manager.get_simultaneous(((1024,), torch.uint8))[0].data_ptr())
    assert len(places) == LANE + 1


ASKED = {"longcat": {"overlap": True}}


def config_of(asked: dict[str, Any] | None = ASKED, **parallel: Any) -> Any:
    given = {
        "use_ubatching": False,
        "prefill_context_parallel_size": 1,
        "data_parallel_size": 1,
        "tensor_parallel_size": 1,
        "enable_expert_parallel": False,
        "all2all_backend": "allgather_reducescatter",
        "worker_cls": "auto",
    }
    return SimpleNamespace(additional_config=asked or {}, parallel_config=SimpleNamespace(**given | parallel))


BOTH = {"data_parallel_size": 2, "tensor_parallel_size": 2, "enable_expert_parallel": True}


@pytest.mark.parametrize(
    ("parallel", "found"),
    [
        ({}, ""),
        ({"tensor_parallel_size": 8, "enable_expert_parallel": True}, ""),
        ({"data_parallel_size": 8, "enable_expert_parallel": True}, ""),
        (BOTH | {"all2all_backend": "deepep_high_throughput"}, ""),
        ({"worker_cls": WORKER}, ""),
        (BOTH, "give --all2all-backend deepep_high_throughput with --enable-expert-parallel"),
        (BOTH | {"enable_expert_parallel": False, "all2all_backend": "deepep_high_throughput"}, "by NCCL"),
        ({"use_ubatching": True}, "leave --enable-dbo and --ubatch-size out"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size is 2, wanted 1"),
        ({"worker_cls": "mine.Worker"}, "worker_cls is 'mine.Worker'"),
    ],
)
def test_a_gpu_overlaps_where_no_two_streams_would_communicate_at_once(parallel: dict[str, Any], found: str) -> None:
    obstacles = Cuda().obstacles_to_overlap(config_of(**parallel))
    assert len(obstacles) == bool(found)
    assert found in "".join(obstacles)


@pytest.mark.parametrize("asked", [True, False, None])
def test_a_gpu_has_a_second_stream_where_it_is_asked_for(asked: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    the_context(CUDAGraphMode.NONE, monkeypatch)
    monkeypatch.setattr(overlap, "second_stream", lambda: None)
    monkeypatch.setattr("longcat_vllm.requested.current", lambda: SimpleNamespace(overlap=asked))
    parallel: Any = None
    assert isinstance(Cuda().branch(runner_of(lambda rows: rows), parallel), SecondStream) is bool(asked)


@pytest.mark.parametrize(
    ("asked", "parallel", "said", "worker"),
    [
        (ASKED, {}, "the experts of a layer run on a second stream", WORKER),
        (None, {}, """it is not asked for; give --additional-config '{"longcat": {"overlap": true}}'""", "auto"),
        (None, BOTH, "tokens are sent to experts by NCCL", "auto"),
        ({"longcat": {"overlap": False}}, {}, "it is turned off", "auto"),
    ],
)
def test_the_log_says_what_overlaps_or_why_nothing_does(
    asked: dict[str, Any] | None,
    parallel: dict[str, Any],
    said: str,
    worker: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = config_of(asked, **parallel)
    monkeypatch.setattr(deployment.devices, "current", Cuda)
    monkeypatch.setattr(deployment.logger, "propagate", True)
    with caplog.at_level("INFO", logger=deployment.logger.name):
        deployment._settle_overlap(config)
    assert said in caplog.text
    assert config.parallel_config.worker_cls == worker
